"""RMS norm, rounded where transformers rounds it."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight [I] * x / sqrt(mean(x^2) + epsilon) for x [..., I]: in fp32, rounded to x's dtype before the weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)
