"""The product of int8 activations with a ternary weight on sparse tensor cores: integers summed exactly, one rescale.

Shapes: T tokens (any leading dimensions), O out_features, K lifted columns (see formats/windows.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.kernels.dispatch import Backend, Operator

OPERATOR = Operator(__name__, (Backend("gpu_sparse_tensor_core", needs=("cuda.bindings",)), Backend("reference")))


def sparse_product(
    codes: Tensor,
    token_scale: Tensor,
    fragments: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """y [..., O] in `dtype` = (codes . weight^T) * row_scale / token_scale + bias, rounded once.

    codes [..., K] int8 and token_scale [..., 1] fp32 are lifted activations, fragments [G, S, 128, 4] int32 the weight
    (see formats/fragments.py), row_scale [O] or [1] and bias [O] fp32. Without gradient.
    """
    return _sparse_product(codes, token_scale, fragments, row_scale, bias, out_features, dtype)


@torch.library.custom_op("sparse_bitnet::sparse_product", mutates_args=())
def _sparse_product(
    codes: Tensor,
    token_scale: Tensor,
    fragments: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return OPERATOR.run(codes, token_scale, fragments, row_scale, bias, out_features, dtype)


@_sparse_product.register_fake
def _(
    codes: Tensor,
    token_scale: Tensor,
    fragments: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], out_features, dtype=dtype)
