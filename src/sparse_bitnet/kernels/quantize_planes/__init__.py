"""Activations x [..., I] -> integer codes as `packed_product` takes them, for torch.compile and few tokens.

Codes [T, B, 4, 1] int8 are channels last, which is planes in memory, [T, 4, B]: each has every fourth column, of which
a byte of the format i2 holds one. Columns beyond I are 0. With them come their total [T] int32 and scale [..., 1] fp32.

A backend takes gate and up [T, 2 I] side by side, and activations.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_bitnet.formats import i2
from sparse_bitnet.kernels.dispatch import Backend, Operator
from sparse_bitnet.kernels.quantize_lifted import halves
from sparse_bitnet.numerics.activation import quantize_activation
from sparse_bitnet.recipe import Activations

OPERATOR = Operator(__name__, (Backend("gpu_cuda", needs=("cuda.bindings",)), Backend("reference")))

Planes = tuple[Tensor, Tensor, Tensor]


def quantize_planes(x: Tensor, activations: Activations) -> Planes:
    """Of x [..., I] float, as plain mathematics, which the compiler joins to what stands before it."""
    codes, scale = quantize_activation(x.reshape(-1, x.shape[-1]), activations)
    row_bytes = i2.bytes_per_row(x.shape[-1])
    by_byte = pad(codes, (0, 4 * row_bytes - x.shape[-1])).view(-1, row_bytes, 4, 1)
    planes = by_byte.contiguous(memory_format=torch.channels_last)
    return planes, codes.sum(-1, dtype=torch.int32), scale.view(*x.shape[:-1], 1)


def quantize_gated_planes(gate_and_up: Tensor, activations: Activations) -> Planes:
    """Of silu(gate) * up, for [..., 2 I], as one kernel: the compiler's own reads both twice.

    Both operations are rounded to the dtype, as PyTorch rounds them. ValueError where there are no halves.
    """
    halves(gate_and_up)
    codes, total, scale = _quantize_gated_planes(gate_and_up.reshape(-1, gate_and_up.shape[-1]), activations)
    return codes, total, scale.view(*gate_and_up.shape[:-1], 1)


@torch.library.custom_op("sparse_bitnet::quantize_gated_planes", mutates_args=())
def _quantize_gated_planes(x: Tensor, activations: str) -> Planes:
    return OPERATOR.run(x, cast(Activations, activations))


@_quantize_gated_planes.register_fake
def _(x: Tensor, activations: str) -> Planes:
    return empty_planes(x)


def empty_planes(x: Tensor) -> Planes:
    """Room for what is made of gate and up [T, 2 I]."""
    tokens, row_bytes = len(x), i2.bytes_per_row(x.shape[-1] // 2)
    codes = x.new_empty(tokens, row_bytes, 4, 1, dtype=torch.int8)
    codes = torch.empty_like(codes, memory_format=torch.channels_last)
    return codes, x.new_empty(tokens, dtype=torch.int32), x.new_empty(tokens, 1, dtype=torch.float32)
