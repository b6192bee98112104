"""Codes of activations x packed codes: `packed_linear` without the quantisation, for torch.compile and few tokens.

Quantisation (quantize_planes) is plain mathematics there, which the compiler joins to what stands before it: one kernel
takes the norm and writes codes. That it is one takes COMPILE_OPTIONS (kernels/compilation.py): they let it write
planes, look for the largest value of a wide token by itself, and leave the residual to the product.

Shapes: T tokens in any leading dimensions, O out_features, I in_features, B bytes a row, P parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.kernels.dispatch import Backend, Operator
from sparse_bitnet.kernels.residual import check_residual

OPERATOR = Operator(__name__, (Backend("gpu_triton", needs=("triton",)), Backend("reference")))


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
    residual: Tensor | None = None,
) -> Tensor:
    """y [..., O] in `dtype` = (codes . weight^T) * scale / token_scale + bias + residual, rounded once.

    codes [T, B, 4, 1], total [T] and token_scale [..., 1] are what quantize_planes gives: codes that are not channels
    last cost a copy. weight [O, B] uint8 in the format i2; scale [P] fp32. residual [..., O] in `dtype`, or None.
    ValueError where it is anything else, or the others do not fit. Without gradient.
    """
    tokens, (rows, row_bytes) = token_scale.numel(), weight.shape
    fits = codes.shape == (tokens, row_bytes, 4, 1) and total.numel() == tokens and scale.numel() == max(1, len(parts))
    if not fits or (bias is not None and bias.numel() != rows):
        told = ", ".join(str(list(one.shape)) for one in (codes, total, token_scale, weight, scale))
        raise ValueError(f"codes, totals, scales, weight and bias do not belong to each other: {told}")
    check_residual(residual, (*token_scale.shape[:-1], len(weight)), dtype, codes.device)
    return OPERATOR.run(codes, total, token_scale, weight, scale, bias, tuple(parts), dtype, residual)


@packed_product.register_fake
def _(codes, total, token_scale, weight, scale, bias, parts, dtype, residual=None):  # type: ignore[no-untyped-def]
    return codes.new_empty(*token_scale.shape[:-1], weight.shape[0], dtype=dtype)
