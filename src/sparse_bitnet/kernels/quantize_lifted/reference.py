"""The slow truth: plain PyTorch on any device."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sparse_bitnet.formats.windows import lift_activation
from sparse_bitnet.numerics.activation import quantize_activation
from sparse_bitnet.recipe import Activations


def obstacle() -> None:
    return None


def supports(x: Tensor, activations: Activations, m: int, codes: Tensor, is_gated: bool) -> str | None:
    return None


def run(x: Tensor, activations: Activations, m: int, codes: Tensor, is_gated: bool) -> tuple[Tensor, Tensor]:
    if is_gated:
        gate, up = x.chunk(2, dim=-1)
        x = F.silu(gate) * up
    found, scale = quantize_activation(x, activations)
    if codes.numel():
        codes.copy_(found)
    return lift_activation(found, m).contiguous(), scale
