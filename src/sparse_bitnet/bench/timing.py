"""What the hardware could do at best, what its time goes into, and weights that its cache does not hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sparse_bitnet.kernels.timing import milliseconds, milliseconds_in_turn

ROOFLINE_BYTES = 2**30  # read and as many written: far beyond any cache
ROOFLINE_SIZE = {"cuda": 8192, "cpu": 2048}
KERNEL_NAME = 100  # characters of it
CACHE_BYTES = 128 * 2**20  # more than twice the L2 of an H100 or H200
MOST_COPIES = 64  # a graph of more launches takes long to record and tells no more
REPEATS = 20  # of what is timed, of which the median counts
LONGEST = 50.0  # milliseconds of one system's repeats

System = tuple[Callable[[Tensor], object], list[Tensor]]
"""A product, and the weights that it takes in turn."""


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


def kernel_times(step: Callable[[], object]) -> list[dict[str, Any]]:
    """Milliseconds and calls of each kernel of a step on a GPU, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    return [
        {"kernel": event.key[:KERNEL_NAME], "ms": event.self_device_time_total / 1e3, "calls": event.count}
        for event in events
        if event.self_device_time_total
    ]


def cold_copies(weight: Tensor) -> list[Tensor]:
    """`weight` and clones of it, so many that taken in turn they come from memory: CACHE_BYTES, or MOST_COPIES."""
    if weight.device.type != "cuda":
        return [weight]
    return [weight, *(weight.clone() for _ in range(min(MOST_COPIES, -(-CACHE_BYTES // weight.nbytes)) - 1))]


def times_of(systems: Mapping[str, System], device: torch.device) -> dict[str, float]:
    """Milliseconds of one product by `NAME_ms`, all systems measured forwards and then backwards."""
    runs = [partial(_each, run, weights) for run, weights in systems.values()]
    times = milliseconds_in_turn(runs, REPEATS, device, LONGEST)
    return {
        f"{name}_ms": time / len(weights) for (name, (_, weights)), time in zip(systems.items(), times, strict=True)
    }


def _each(run: Callable[[Tensor], object], weights: Sequence[Tensor]) -> None:
    """Results are let go one by one, so that no system needs room for all of them."""
    for weight in weights:
        run(weight)
