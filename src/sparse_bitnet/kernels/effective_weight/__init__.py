"""Training: latent weight [O, I] -> effective weight [O, I], differentiable by the dual straight-through estimator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_bitnet.kernels.dispatch import Backend, Operator
from sparse_bitnet.numerics.ste import latent_weight_gradient
from sparse_bitnet.numerics.ternary import Parts
from sparse_bitnet.recipe import Recipe

OPERATOR = Operator(__name__, (Backend("reference"),))


def effective_weight(weight: Tensor, recipe: Recipe, parts: Parts, dtype: torch.dtype) -> Tensor:
    """`numerics.ternary.effective_weight` by the best backend, with the recipe's gradient to the latent weight."""
    if recipe.keeps_weight:
        return weight.to(dtype)
    return _effective_weight(weight, recipe.key, list(parts), dtype)


@torch.library.custom_op("sparse_bitnet::effective_weight", mutates_args=())
def _effective_weight(weight: Tensor, recipe: str, parts: list[int], dtype: torch.dtype) -> Tensor:
    return OPERATOR.run(weight, Recipe.from_key(recipe), tuple(parts), dtype)


@_effective_weight.register_fake
def _(weight: Tensor, recipe: str, parts: list[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, recipe, parts, _ = inputs
    ctx.save_for_backward(weight)
    ctx.recipe, ctx.parts = Recipe.from_key(recipe), tuple(parts)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    (weight,) = ctx.saved_tensors
    return latent_weight_gradient(gradient, weight, ctx.recipe, ctx.parts), None, None, None


_effective_weight.register_autograd(_backward, setup_context=_save_for_backward)
