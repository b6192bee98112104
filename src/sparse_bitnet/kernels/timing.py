"""How long something takes on this machine: for benchmarks, and for choices that are made by measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from sparse_bitnet.kernels.capture import capture

FEWEST = 3  # times, however long one takes


def milliseconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time of one `run`, after a warm-up; on a GPU as a replayed CUDA graph, free of launch gaps."""
    return _median(_timer(run, device), repeats)


def milliseconds_in_turn(
    runs: Sequence[Callable[[], object]], repeats: int, device: torch.device, longest: float
) -> list[float]:
    """Of each of several: the mean of two medians, taken forwards and then backwards, as a warm GPU is a slower one.

    longest  milliseconds that one series of `repeats` may take before it is cut, to no fewer than FEWEST
    """
    timers = [_timer(run, device) for run in runs]
    forwards = [_median(timer, repeats, longest) for timer in timers]
    backwards = [_median(timer, repeats, longest) for timer in reversed(timers)]
    return [statistics.fmean(both) for both in zip(forwards, reversed(backwards), strict=True)]


def _median(timer: Callable[[], float], repeats: int, longest: float = float("inf")) -> float:
    once = timer()  # warms up, and tells how many fit
    count = max(min(repeats, FEWEST), int(min(repeats, longest / once)))
    return statistics.median(timer() for _ in range(count))


def _timer(run: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Gives the milliseconds of one `run`, each time that it is called."""
    if device.type != "cuda":
        return lambda: _host_milliseconds(run)
    graph, _ = capture(run, device)
    for _ in range(2):
        _replay_milliseconds(graph, device)
    return lambda: _replay_milliseconds(graph, device)


def _replay_milliseconds(graph: torch.cuda.CUDAGraph, device: torch.device) -> float:
    """Of the second replay of two: the host launches it, hundreds of kernels perhaps, while the first one runs."""
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
    return start.elapsed_time(end)


def _host_milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)
