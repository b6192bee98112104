"""How long something takes on this machine: for benchmarks, and for choices that are made by measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def milliseconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time of one `run`, after a warm-up; on a GPU as a replayed CUDA graph, free of launch gaps."""
    if device.type != "cuda":
        run()
        return statistics.median(_host_milliseconds(run) for _ in range(repeats))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # what other threads do is their affair
        run()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _host_milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)
