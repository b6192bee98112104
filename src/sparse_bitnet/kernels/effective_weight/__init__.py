"""Training: latent weight [O, I] -> effective weight [O, I], differentiable by the dual straight-through estimator."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from sparse_bitnet.kernels.dispatch import Backend, Operator
from sparse_bitnet.numerics.ste import latent_weight_gradient
from sparse_bitnet.numerics.ternary import Parts
from sparse_bitnet.recipe import Recipe

OPERATOR = Operator(__name__, (Backend("gpu_triton", needs=("triton",)), Backend("reference")))


def effective_weight(weight: Tensor, recipe: Recipe, parts: Parts, dtype: torch.dtype) -> Tensor:
    """`numerics.ternary.effective_weight` by the best backend, with the recipe's gradient to the latent weight."""
    if recipe.keeps_weight:
        return weight.to(dtype)
    return _effective_weight(weight, recipe.key, list(parts), dtype)


@torch.no_grad()
def write_effective_weights(
    weights: Sequence[Tensor], recipe: Recipe, parts: Sequence[Parts], out: Sequence[Tensor], scale: Tensor
) -> None:
    """The effective weights of many layers at once: latent weights [..., O, I] and their parts -> `out` and `scale`.

    `out` are of the shapes of `weights` and of one float dtype, or int8 for the codes; `scale` (see `empty_scale`) is
    left alone for `values="full"`. Without gradient; what autograd saved of `out` before may not be used after.
    """
    OPERATOR.run(weights, recipe, parts, out, scale)
    torch.autograd.graph.increment_version([*out, scale])


def with_latent_gradient(effective: Tensor, weight: Tensor, recipe: Recipe, parts: Parts) -> Tensor:
    """`effective`, made before from the latent `weight`, with the recipe's gradient to it."""
    return _WithLatentGradient.apply(effective, weight, recipe, parts)  # type: ignore[no-any-return]


class _WithLatentGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, effective: Tensor, weight: Tensor, recipe: Recipe, parts: Parts) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.recipe, ctx.parts = recipe, parts
        return effective.view_as(effective)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return None, latent_weight_gradient(gradient, weight, ctx.recipe, ctx.parts), None, None


def empty_scale(weights: Sequence[Tensor], parts: Sequence[Parts]) -> Tensor:
    """Room for the scales [P] fp32 of these weights [..., O, I], one after the other."""
    count = sum(scale_count(weight, heights) for weight, heights in zip(weights, parts, strict=True))
    return torch.empty(count, dtype=torch.float32, device=weights[0].device)


def scale_count(weight: Tensor, parts: Parts) -> int:
    """How many scales a weight [..., O, I] has: one a part, of each expert."""
    return prod(weight.shape[:-2]) * max(1, len(parts))


@torch.library.custom_op("sparse_bitnet::effective_weight", mutates_args=())
def _effective_weight(weight: Tensor, recipe: str, parts: list[int], dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(weight, dtype=dtype)
    weights, heights = (weight,), (tuple(parts),)
    OPERATOR.run(weights, Recipe.from_key(recipe), heights, (out,), empty_scale(weights, heights))
    return out


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
