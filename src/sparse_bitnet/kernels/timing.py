"""How long something takes on this machine: for benchmarks, and for choices that are made by measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from sparse_bitnet.kernels.capture import capture

FEWEST = 3  # times, however long one takes


def milliseconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time of one `run`, after a warm-up; on a GPU as a replayed CUDA graph, free of launch gaps."""
    return _median(_timer(run, device), repeats)


def milliseconds_in_turn(
    runs: Sequence[Callable[[], object]], repeats: int, device: torch.device, longest: float = float("inf")
) -> list[float]:
    """Of each of several: the mean of two medians, taken forwards and then backwards, as a warm GPU is a slower one.

    longest  milliseconds that one series of `repeats` may take before it is cut, to no fewer than FEWEST
    """
    timers = [_timer(run, device) for run in runs]
    forwards = [_median(timer, repeats, longest) for timer in timers]
    backwards = [_median(timer, repeats, longest) for timer in reversed(timers)]
    return [statistics.fmean(both) for both in zip(forwards, reversed(backwards), strict=True)]


def _median(timer: Callable[[int], list[float]], repeats: int, longest: float = float("inf")) -> float:
    (once,) = timer(1)  # warms up, and tells how many fit
    return statistics.median(timer(max(min(repeats, FEWEST), int(min(repeats, longest / once)))))


def _timer(run: Callable[[], object], device: torch.device) -> Callable[[int], list[float]]:
    """Gives the milliseconds of each of so many `run`s, each time that it is called."""
    if device.type != "cuda":
        return lambda count: [_host_milliseconds(run) for _ in range(count)]
    graph, _ = capture(run, device)
    _replay_milliseconds(graph, 1, device)
    return lambda count: _replay_milliseconds(graph, count, device)


def _replay_milliseconds(graph: torch.cuda.CUDAGraph, count: int, device: torch.device) -> list[float]:
    """Of each of `count` replays behind another: the host launches hundreds of kernels, perhaps, while one runs."""
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        graph.replay()
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        events[-1].synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(events)]


def _host_milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)
