"""Codes of activations x packed codes: `packed_linear` without the quantisation, for torch.compile and few tokens.

Quantisation is plain mathematics there, which the compiler joins to what stands before it: one kernel adds the
residual, takes the norm and writes codes. That it is one takes COMPILE_OPTIONS: they let it write planes (see
packed_linear/gpu_triton.py), and look for the largest value of a wide token by itself.

Shapes: T tokens, O out_features, I in_features, B bytes a row, P parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_bitnet.formats import i2
from sparse_bitnet.kernels.dispatch import Backend, Operator
from sparse_bitnet.kernels.packed_linear import PackedLayout
from sparse_bitnet.numerics.activation import quantize_activation

OPERATOR = Operator(__name__, (Backend("gpu_triton", needs=("triton",)), Backend("reference")))
COMPILE_OPTIONS: dict[str, Any] = {"triton.tiling_prevents_reduction_fusion": False, "split_reductions": False}
"""For `torch.compile(model, options=...)` of an accelerated model that writes up to 64 sequences: with them all that
stands between two of its products, quantisation and norm, is one kernel."""


def quantize_planes(x: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor, Tensor]:
    """codes, total and token_scale of `packed_product`, of x [..., I] float."""
    codes, token_scale = quantize_activation(x.reshape(-1, layout.in_features), layout.activations)  # [T, I], [T, 1]
    row_bytes = i2.bytes_per_row(layout.in_features)
    by_byte = pad(codes, (0, 4 * row_bytes - layout.in_features)).view(-1, row_bytes, 4, 1)
    return by_byte.contiguous(memory_format=torch.channels_last), codes.sum(-1, dtype=torch.int32), token_scale


@torch.library.custom_op("sparse_bitnet::packed_product", mutates_args=())
def packed_product(
    codes: Tensor,
    total: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    parts: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """y [T, O] in `dtype` = (codes . weight^T) * scale / token_scale + bias, rounded once. Without gradient.

    codes [T, B, 4, 1] int8, of no cost if channels last, which is planes in memory: [T, 4, B]; total [T] int32, their
    sum; token_scale [T, 1] fp32; weight [O, B] uint8 in the format i2; scale [P] fp32.
    """
    return OPERATOR.run(codes, total, token_scale, weight, scale, bias, tuple(parts), dtype)


@packed_product.register_fake
def _(codes, total, token_scale, weight, scale, bias, parts, dtype):  # type: ignore[no-untyped-def]
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=dtype)
