"""The slow truth: plain PyTorch on any device."""

from __future__ import annotations

from torch import Tensor

from sparse_bitnet.formats.windows import lift_activation
from sparse_bitnet.numerics.activation import quantize_activation
from sparse_bitnet.recipe import Activations


def obstacle() -> None:
    return None


def supports(x: Tensor, activations: Activations, m: int) -> str | None:
    return None


def run(x: Tensor, activations: Activations, m: int) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_activation(x, activations)
    return lift_activation(codes, m).contiguous(), scale
