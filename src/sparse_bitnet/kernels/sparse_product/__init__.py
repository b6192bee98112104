"""The product of int8 activations with a ternary weight on sparse tensor cores: integers summed exactly, one rescale.

Shapes: T tokens (any leading dimensions), O out_features, K lifted columns (see formats/windows.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_bitnet.formats.fragments import shape
from sparse_bitnet.kernels.dispatch import Backend, Operator
from sparse_bitnet.kernels.residual import check_residual

OPERATOR = Operator(__name__, (Backend("gpu_sparse_tensor_core", needs=("cuda.bindings",)), Backend("reference")))

COLUMNS_MULTIPLE, ROWS_MULTIPLE = 16, 8  # of K and of O, which the copies of whole tiles need


@dataclass(frozen=True)
class SparseWeight:
    """Fragments [G, S, 128, 4] int32 (formats/fragments.py), row_scale [O] or [1] and bias [O] or None, both fp32.

    Fragments are not to be what the launch right before the product writes: a GPU may read them while that one ends.
    """

    fragments: Tensor
    row_scale: Tensor
    bias: Tensor | None
    out_features: int


@torch.library.custom_op("sparse_bitnet::sparse_product", mutates_args=())
def sparse_product(
    codes: Tensor,
    token_scale: Tensor,
    fragments: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """y [..., O] in `dtype` = (codes . weight^T) * row_scale / token_scale + bias + residual, rounded once.

    codes [..., K] int8 and token_scale [..., 1] fp32 are lifted activations; the others see `SparseWeight`. residual
    [..., O] in `dtype`, or None. ValueError where it is anything else, or the others do not fit. Without gradient.
    """
    floats = [row_scale] if bias is None else [row_scale, bias]
    fits = fragments.shape == shape(out_features, codes.shape[-1]) and row_scale.numel() in (1, out_features)
    fits = fits and (bias is None or bias.numel() == out_features)
    if not fits or any(one.dtype != torch.float32 for one in floats):
        told = ", ".join(f"{list(one.shape)} in {one.dtype}" for one in (codes, fragments, *floats))
        raise ValueError(f"codes, fragments, fp32 scales and bias do not belong to each other: {told}")
    check_residual(residual, (*codes.shape[:-1], out_features), dtype, codes.device)
    weight = SparseWeight(fragments, row_scale, bias, out_features)
    return OPERATOR.run(codes, token_scale, weight, dtype, residual)


@sparse_product.register_fake
def _(codes, token_scale, fragments, row_scale, bias, out_features, dtype, residual=None):  # type: ignore[no-untyped-def]
    return codes.new_empty(*codes.shape[:-1], out_features, dtype=dtype)
