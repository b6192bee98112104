"""The slow truth: plain PyTorch on any device."""

from __future__ import annotations

from torch import Tensor

from sparse_bitnet.formats.windows import lift_activation
from sparse_bitnet.kernels.quantize_lifted import GATE, Before, Norm, gated
from sparse_bitnet.numerics.activation import quantize_activation
from sparse_bitnet.numerics.norm import rms_norm
from sparse_bitnet.recipe import Activations


def obstacle() -> None:
    return None


def supports(x: Tensor, activations: Activations, m: int, codes: Tensor, before: Before) -> str | None:
    return None


def run(x: Tensor, activations: Activations, m: int, codes: Tensor, before: Before) -> tuple[Tensor, Tensor]:
    if before == GATE:
        x = gated(x)
    if isinstance(before, Norm):
        x = rms_norm(x, before.weight, before.epsilon)
    found, scale = quantize_activation(x, activations)
    if codes.numel():
        codes.copy_(found)
    return lift_activation(found, m).contiguous(), scale
