"""Gradients of what has none: straight-through estimators, as rules on the incoming gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.numerics.ternary import Parts, weight_mask
from sparse_bitnet.recipe import Recipe


def latent_weight_gradient(gradient: Tensor, weight: Tensor, recipe: Recipe, parts: Parts) -> Tensor:
    """Gradient of the effective weight [..., O, I] -> gradient of the latent weight, in its dtype.

    `dense` passes it on unchanged, through the rounding and through the mask (dual STE), so that masked weights learn
    and can return; `masked` stops it where the mask is 0. (arXiv 2603.05168, section 3)
    """
    if recipe.gradient == "masked":
        gradient = gradient.masked_fill(~weight_mask(weight, recipe, parts), 0)
    return gradient.to(weight.dtype)


def activation_gradient(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of the fake-quantised activation [..., I] -> gradient of x: straight through, clipped too."""
    return gradient.to(dtype)
