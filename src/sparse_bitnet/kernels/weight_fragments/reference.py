"""The slow truth: plain PyTorch on any device, one weight after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_bitnet.formats import fragments
from sparse_bitnet.formats.windows import lift_weight


def obstacle() -> None:
    return None


def supports(weights: Sequence[Tensor], m: int, out: Sequence[Tensor]) -> str | None:
    return None


def run(weights: Sequence[Tensor], m: int, out: Sequence[Tensor]) -> None:
    for weight, target in zip(weights, out, strict=True):
        target.copy_(fragments.pack(lift_weight(weight.sign().to(torch.int8), m)))
