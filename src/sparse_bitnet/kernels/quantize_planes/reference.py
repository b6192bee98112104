"""The slow truth: plain PyTorch on any device."""

from __future__ import annotations

from torch import Tensor

from sparse_bitnet.kernels.quantize_lifted import gated
from sparse_bitnet.kernels.quantize_planes import Planes, quantize_planes
from sparse_bitnet.recipe import Activations


def obstacle() -> None:
    return None


def supports(x: Tensor, activations: Activations) -> str | None:
    return None


def run(x: Tensor, activations: Activations) -> Planes:
    return quantize_planes(gated(x), activations)
