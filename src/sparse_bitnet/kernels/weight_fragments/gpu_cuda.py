"""Fragments of many weights on a GPU in one launch; each weight is read once. The kernel is in gpu_cuda.cu."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sparse_bitnet.formats import fragments
from sparse_bitnet.formats.windows import lifted_width
from sparse_bitnet.kernels import cuda_device

SOURCE = Path(__file__).with_suffix(".cu")
READ_AS = {torch.float32: "int", torch.bfloat16: "short", torch.float16: "short", torch.int8: "signed char"}
ROWS, BLOCKS, THREADS = 64, 16, 128  # a unit: rows, groups of m, threads
obstacle = cuda_device.obstacle


def supports(weights: Sequence[Tensor], m: int, out: Sequence[Tensor]) -> str | None:
    for weight, target in zip(weights, out, strict=True):
        if not (weight.is_cuda and target.is_cuda):
            return f"the weight is on {weight.device.type}"
        if weight.dtype not in READ_AS or weight.dtype != weights[0].dtype:
            return f"weights of {weight.dtype}; it takes {', '.join(map(str, READ_AS))}, all of one kind"
        if not (weight.is_contiguous() and target.is_contiguous()):
            return "the weight is not contiguous"
        if weight.data_ptr() % 16:
            return "the weight does not begin at a multiple of 16 bytes"
    return None


def run(weights: Sequence[Tensor], m: int, out: Sequence[Tensor]) -> None:
    if not weights:
        return
    shapes = tuple((weight.shape[0], weight.shape[1]) for weight in weights)
    places = tuple((weight.data_ptr(), target.data_ptr()) for weight, target in zip(weights, out, strict=True))
    table, weight_of_unit = _tabulate(shapes, places, m, weights[0].device)
    if not len(weight_of_unit):
        return
    dtype = weights[0].dtype
    kernel = cuda_device.compile_kernel(
        SOURCE, "pack_fragments", M=m, SOURCE=READ_AS[dtype], IS_FLOAT=int(dtype.is_floating_point)
    )
    with torch.cuda.device_of(weights[0]):
        kernel.launch(len(weight_of_unit), THREADS, (), table.data_ptr(), weight_of_unit.data_ptr())


@lru_cache(maxsize=64)
def _tabulate(
    shapes: tuple[tuple[int, int], ...], places: tuple[tuple[int, int], ...], m: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The table of `struct Weight` [W, 5] int64, and which weight each unit belongs to [U] int32."""
    rows: list[tuple[int, ...]] = []
    weight_of_unit: list[int] = []
    for (height, width), (source, target) in zip(shapes, places, strict=True):
        blocks, stages = width // m, fragments.shape(height, lifted_width(width, m))[1]
        units_a_row, groups = -(-blocks // BLOCKS), -(-height // ROWS)
        first = len(weight_of_unit)
        pairs = ((height, blocks), (stages, units_a_row), (first, 0))
        rows.append((source, target, *(low | high << 32 for low, high in pairs)))
        weight_of_unit += [len(rows) - 1] * (groups * units_a_row)
    return (
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.tensor(weight_of_unit, dtype=torch.int32).to(device),
    )
