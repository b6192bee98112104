"""The slow truth: unpack, multiply exactly, rescale once; plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.formats import get_format
from sparse_bitnet.kernels.packed_linear import PackedLayout, check_arguments
from sparse_bitnet.numerics.activation import quantize_activation
from sparse_bitnet.numerics.ternary import scale_by_row

WIDEST_EXACT_IN_FP32 = 2**24 // 128  # sums of I products of magnitude up to 128 stay below 2^24


def obstacle() -> None:
    return None


def supports(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, layout: PackedLayout) -> str | None:
    return None


def run(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, layout: PackedLayout) -> Tensor:
    check_arguments(x, weight, scale, bias, layout)
    codes = get_format(layout.format).unpack(weight, layout.in_features)  # [O, I]
    row_scale = scale_by_row(scale, layout.parts, codes.shape[0]).squeeze(-1)  # [O] or [1]
    if layout.activations == "none":
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            y = x.to(wide) @ codes.to(wide).T * row_scale
    else:
        q, token_scale = quantize_activation(x, layout.activations)
        y = integer_product(q, codes) * (row_scale / token_scale)
    return (y if bias is None else y + bias).to(x.dtype)


def integer_product(q: Tensor, codes: Tensor) -> Tensor:
    """q [..., I] int8 and codes [O, I] int8 -> q . codes^T [..., O] in floats that hold every integer sum exactly.

    Floats because only they have fast matrix products everywhere: fp32 holds the sums of up to 131,072 products, fp64
    those of any width. (TF32 would be exact too: int8 fits its mantissa, and it adds in fp32.) Autocast would take 16
    bits, and is off.
    """
    dtype = torch.float32 if codes.shape[1] <= WIDEST_EXACT_IN_FP32 else torch.float64
    with torch.autocast(q.device.type, enabled=False):
        return q.to(dtype) @ codes.to(dtype).T
