"""Inference: activations x packed codes -> float, y = (q . codes^T) * scale / s + bias with integers summed exactly.

Shapes: T tokens (any leading dimensions), O out_features, I in_features, P parts, B bytes a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from sparse_bitnet.formats import get_format
from sparse_bitnet.kernels.dispatch import Backend, Operator
from sparse_bitnet.kernels.packed_linear.gradient import backward, keep_for_backward
from sparse_bitnet.numerics.ternary import Parts
from sparse_bitnet.recipe import Activations

NATIVE = Backend(
    "cpu_native",
    needs=("sparse_bitnet._native",),
    remedy="install a C++ compiler (g++ or clang++), then run `pip install` of sparse-bitnet again",
)
OPERATOR = Operator(__name__, (NATIVE, Backend("gpu_triton", needs=("triton",)), Backend("reference")))


@dataclass(frozen=True)
class PackedLayout:
    """What the bytes of a packed weight mean, and how its activations are quantised."""

    format: str
    in_features: int
    activations: Activations
    parts: Parts = ()


def check_arguments(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, layout: PackedLayout) -> None:
    """ValueError where they do not fit each other: every backend looks before it reads."""
    rows, row_bytes = weight.shape
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}: a packed layer takes floats")
    if weight.dtype != torch.uint8 or layout.in_features < 1:
        raise ValueError(f"weight {list(weight.shape)} in {weight.dtype} is not of uint8 and of at least a column")
    if row_bytes != get_format(layout.format).bytes_per_row(layout.in_features) or x.shape[-1] != layout.in_features:
        raise ValueError(
            f"x {list(x.shape)} and weight {list(weight.shape)} are not of in_features={layout.in_features}"
        )
    if scale.numel() != max(1, len(layout.parts)) or (bias is not None and bias.shape != (rows,)):
        raise ValueError(f"scale or bias do not belong to {rows} rows in {max(1, len(layout.parts))} parts")


def packed_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, layout: PackedLayout) -> Tensor:
    """x [..., I] float, weight [O, B] uint8, scale [P] fp32, bias [O] -> y [..., O] in x's dtype.

    Gradients reach x, straight through its rounding, and bias; weight and scale are constants.
    """
    return _packed_linear(
        x, weight, scale, bias, layout.format, layout.in_features, layout.activations, list(layout.parts)
    )


@torch.library.custom_op("sparse_bitnet::packed_linear", mutates_args=())
def _packed_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    format: str,
    in_features: int,
    activations: str,
    parts: list[int],
) -> Tensor:
    return OPERATOR.run(x, weight, scale, bias, _layout(format, in_features, activations, tuple(parts)))


@_packed_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    format: str,
    in_features: int,
    activations: str,
    parts: list[int],
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_packed_linear.register_autograd(backward, setup_context=keep_for_backward)


@lru_cache(maxsize=1024)
def _layout(format: str, in_features: int, activations: str, parts: Parts) -> PackedLayout:
    return PackedLayout(format, in_features, cast(Activations, activations), parts)
