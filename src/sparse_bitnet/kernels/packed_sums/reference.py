"""The slow truth: plain PyTorch on any device, in one part."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.formats import i2
from sparse_bitnet.kernels.packed_linear.reference import integer_product


def obstacle() -> None:
    return None


def supports(codes: Tensor, weight: Tensor) -> str | None:
    return None


def run(codes: Tensor, weight: Tensor) -> Tensor:
    flat = codes.flatten(1)  # [T, 4 B]
    return integer_product(flat, i2.unpack(weight, flat.shape[1]) + 1).to(torch.int32)[None]
