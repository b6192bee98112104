"""Inference: activations x packed codes -> float, y = (q . codes^T) * scale / s + bias with integers summed exactly.

Shapes: T tokens (any leading dimensions), O out_features, I in_features, P parts, B bytes a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

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
