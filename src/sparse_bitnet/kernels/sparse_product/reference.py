"""The slow truth: unpack, multiply exactly, rescale once; plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.formats import fragments
from sparse_bitnet.kernels.packed_linear.reference import integer_product
from sparse_bitnet.kernels.sparse_product import SparseWeight


def obstacle() -> None:
    return None


def supports(*arguments: object) -> str | None:
    return None


def run(
    codes: Tensor, token_scale: Tensor, weight: SparseWeight, dtype: torch.dtype, residual: Tensor | None = None
) -> Tensor:
    lifted = fragments.unpack(weight.fragments, weight.out_features)[:, : codes.shape[-1]]  # [O, K]
    y = integer_product(codes, lifted) * (weight.row_scale / token_scale)
    y = y if weight.bias is None else y + weight.bias
    return (y if residual is None else y + residual).to(dtype)
