"""On a GPU: the second launch of packed_linear/gpu_triton.py, which tells how it works."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.kernels.packed_linear import PackedLayout, gpu_triton
from sparse_bitnet.numerics.ternary import Parts

obstacle = gpu_triton.obstacle


def supports(
    codes: Tensor, total: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    parts: Parts, dtype: torch.dtype, residual: Tensor | None,
) -> str | None:  # fmt: skip
    if not weight.is_contiguous():
        return "the weight is not contiguous"  # and what makes it so may not be over when it is read
    layout = PackedLayout("i2", 4 * weight.shape[1], "int8", parts)
    return gpu_triton.supports(token_scale.new_empty(0, dtype=dtype), weight, scale, bias, layout)


def run(
    codes: Tensor, total: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    parts: Parts, dtype: torch.dtype, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    tokens, row_bytes = codes.shape[:2]
    y = torch.empty(*token_scale.shape[:-1], len(weight), dtype=dtype, device=codes.device)
    if y.numel():
        planes = codes.permute(0, 2, 1, 3).reshape(tokens, 4, row_bytes).contiguous()
        tile = gpu_triton.choose_tile(tokens, *weight.shape)
        sums, scales = total.contiguous()[None], token_scale.contiguous()
        gpu_triton.multiply(planes, sums, scales, weight, scale, bias, parts, y, tile, residual)
    return y
