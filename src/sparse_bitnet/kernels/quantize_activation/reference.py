"""The slow truth: plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.numerics import activation
from sparse_bitnet.recipe import Activations


def obstacle() -> None:
    return None


def supports(x: Tensor, activations: Activations, dtype: torch.dtype) -> str | None:
    return None


def run(x: Tensor, activations: Activations, dtype: torch.dtype) -> Tensor:
    return activation.fake_quantize_activation(x, activations, dtype).contiguous()
