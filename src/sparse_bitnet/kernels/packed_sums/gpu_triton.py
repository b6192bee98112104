"""On a GPU: the product of packed_linear/gpu_triton.py, which tells how it works, without its first and last step."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.kernels import triton_device
from sparse_bitnet.kernels.packed_linear import gpu_triton

obstacle = triton_device.obstacle


def supports(codes: Tensor, weight: Tensor) -> str | None:
    for tensor in (codes, weight):
        if not triton_device.is_within_reach(tensor):
            return f"a tensor is on {tensor.device.type}"
    if weight.numel() >= 2**31:
        return f"a weight of {weight.numel()} bytes, which 32 bits do not count"
    return None


def run(codes: Tensor, weight: Tensor) -> Tensor:
    tokens, row_bytes = codes.shape[:2]
    planes = codes.permute(0, 2, 1, 3).reshape(tokens, 4, row_bytes).contiguous()
    tile = gpu_triton.choose_tile(tokens, *weight.shape)
    parts = torch.empty(tile.splits, tokens, weight.shape[0], dtype=torch.int32, device=codes.device)
    gpu_triton.multiply(planes, weight.contiguous(), parts, tile)
    return parts
