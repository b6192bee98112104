"""How long something takes, and what the hardware could do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

ROOFLINE_BYTES = 2**30  # read and as many written: far beyond any cache
ROOFLINE_SIZE = {"cuda": 8192, "cpu": 2048}


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
    with torch.cuda.graph(graph):
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


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of an elementwise kernel over arrays far beyond the caches."""
    source = torch.randn(ROOFLINE_BYTES // 4 // (1 if device.type == "cuda" else 8), device=device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / milliseconds(lambda: torch.add(source, 1, out=target), 10, device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large product of random matrices in `dtype`."""
    size = ROOFLINE_SIZE.get(device.type, 2048)
    one, other = torch.randn(2, size, size, device=device).to(dtype).unbind()
    return 2e3 * size**3 / milliseconds(lambda: one @ other, 10, device)


def _host_milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)
