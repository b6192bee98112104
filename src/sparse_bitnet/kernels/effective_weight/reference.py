"""The slow truth: plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.numerics import ternary
from sparse_bitnet.numerics.ternary import Parts
from sparse_bitnet.recipe import Recipe


def obstacle() -> None:
    return None


def supports(weight: Tensor, recipe: Recipe, parts: Parts, dtype: torch.dtype) -> str | None:
    return None


def run(weight: Tensor, recipe: Recipe, parts: Parts, dtype: torch.dtype) -> Tensor:
    return ternary.effective_weight(weight, recipe, parts, dtype)
