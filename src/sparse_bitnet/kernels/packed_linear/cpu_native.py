"""On a CPU, in C++ (`csrc/`): bit for bit the reference, integers and floats, straight from the packed bytes.

The instruction set is the fastest that the processor has, or the one that SPARSE_BITNET_CPU names. It uses as many
threads as torch does, of its own: they wait 50 microseconds for the next call, then sleep, while torch's own work.
"""

from __future__ import annotations

import os
from functools import cache
from math import prod

import torch
from torch import Tensor

from sparse_bitnet import _native
from sparse_bitnet.kernels.packed_linear import PackedLayout, check_arguments
from sparse_bitnet.kernels.packed_linear.reference import WIDEST_EXACT_IN_FP32
from sparse_bitnet.numerics.ternary import scale_by_row

CPU_VARIABLE = "SPARSE_BITNET_CPU"
FORMATS = {name: number for number, name in enumerate(("i2", "t5", "g4", "g4s2", "g4s3"))}  # as csrc numbers them
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def instruction_sets() -> list[str]:
    """Those that this processor can run, the fastest first."""
    return _native.instruction_sets()


def instruction_set() -> str:
    """The one that runs; ValueError where SPARSE_BITNET_CPU names one that this processor cannot run."""
    return instruction_sets()[instruction_set_number(os.environ.get(CPU_VARIABLE))]


@cache
def instruction_set_number(forced: str | None) -> int:
    """Its index in what is available; ValueError where `forced` is not."""
    available = instruction_sets()
    if not forced:
        return 0
    if forced not in available:
        raise ValueError(f"{CPU_VARIABLE}={forced}: this processor can run {', '.join(available)}")
    return available.index(forced)


def obstacle() -> None:
    return None


def supports(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, layout: PackedLayout) -> str | None:
    for tensor in (x, weight, scale, bias):
        if tensor is not None and tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device.type}"
    for tensor in (x, bias):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{tensor.dtype}; it takes {', '.join(map(str, DTYPES))}"
    if layout.activations == "none":
        return "activations='none' are no integers"
    if layout.format not in FORMATS:
        return f"it has no format {layout.format}"
    if layout.in_features > WIDEST_EXACT_IN_FP32:
        return f"in_features={layout.in_features} is beyond {WIDEST_EXACT_IN_FP32}, above which fp32 is not exact"
    return None


def run(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, layout: PackedLayout) -> Tensor:
    check_arguments(x, weight, scale, bias, layout)
    rows = len(weight)
    x, weight, scale = x.contiguous(), weight.contiguous(), scale.float().contiguous()
    bias = None if bias is None else bias.contiguous()
    row_scale = scale_by_row(scale, layout.parts, rows).contiguous() if layout.parts else None  # [O, 1]
    y = x.new_empty(*x.shape[:-1], rows)
    _native.packed_linear(*native_arguments(x, weight, scale, row_scale, bias, layout, y), torch.get_num_threads())
    return y


def native_arguments(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
    layout: PackedLayout,
    y: Tensor,
) -> tuple[int, ...]:
    """Those of `_native.packed_linear` but the last, threads: addresses in contiguous tensors that are known to fit."""
    return (
        instruction_set_number(os.environ.get(CPU_VARIABLE)),
        x.data_ptr(), DTYPES[x.dtype], prod(x.shape[:-1]), layout.in_features, layout.activations == "int4",
        weight.data_ptr(), *weight.shape, FORMATS[layout.format],
        scale.data_ptr(), 0 if row_scale is None else row_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(), 0 if bias is None else DTYPES[bias.dtype],
        y.data_ptr(),
    )  # fmt: skip
