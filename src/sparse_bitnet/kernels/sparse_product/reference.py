"""The slow truth: unpack, multiply exactly, rescale once; plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.formats import fragments as layout
from sparse_bitnet.kernels.packed_linear.reference import integer_product


def obstacle() -> None:
    return None


def supports(
    codes: Tensor,
    token_scale: Tensor,
    fragments: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> str | None:
    return None


def run(
    codes: Tensor,
    token_scale: Tensor,
    fragments: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    weight = layout.unpack(fragments, out_features)[:, : codes.shape[-1]]  # [O, K]
    y = integer_product(codes, weight) * (row_scale / token_scale)
    return (y if bias is None else y + bias).to(dtype)
