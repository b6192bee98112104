"""The slow truth: plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.formats import i2
from sparse_bitnet.kernels.packed_linear.reference import integer_product
from sparse_bitnet.numerics.ternary import Parts, scale_by_row


def obstacle() -> None:
    return None


def supports(*arguments: object) -> str | None:
    return None


def run(
    codes: Tensor, total: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    parts: Parts, dtype: torch.dtype, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    flat = codes.flatten(1)  # [T, 4 B], of which the last are 0
    sums = integer_product(flat, i2.unpack(weight, flat.shape[1])).view(*token_scale.shape[:-1], len(weight))
    y = sums * (scale_by_row(scale, parts, len(weight)).squeeze(-1) / token_scale)
    y = y if bias is None else y + bias
    return (y if residual is None else y + residual).to(dtype)
