"""The slow truth: plain PyTorch on any device, one weight after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_bitnet.numerics.ternary import Parts, dequantize_weight, effective_weight, quantize_weight
from sparse_bitnet.recipe import Recipe


def obstacle() -> None:
    return None


def supports(
    weights: Sequence[Tensor], recipe: Recipe, parts: Sequence[Parts], out: Sequence[Tensor], scale: Tensor
) -> str | None:
    return None


def run(
    weights: Sequence[Tensor], recipe: Recipe, parts: Sequence[Parts], out: Sequence[Tensor], scale: Tensor
) -> None:
    found = []
    for weight, heights, target in zip(weights, parts, out, strict=True):
        if recipe.values == "full":
            target.copy_(effective_weight(weight, recipe, heights, target.dtype))
            continue
        codes, one = quantize_weight(weight, recipe, heights)
        target.copy_(codes if target.dtype == torch.int8 else dequantize_weight(codes, one, heights, target.dtype))
        found.append(one.flatten())
    if found:
        scale.copy_(torch.cat(found))
