"""The gradient rules: what passes unchanged is equal bit for bit, what is stopped is zero exactly where the mask is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from numerics import oracle
from numerics.recipes import all_recipes
from sparse_bitnet.numerics.ste import activation_gradient, latent_weight_gradient
from sparse_bitnet.recipe import Recipe

RECIPES = all_recipes("2:4", activations=("int8",))


def weight_and_gradient(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 8, generator=generator), torch.randn(6, 8, generator=generator).to(dtype)


@pytest.mark.parametrize("recipe", [one for one in RECIPES if one.gradient == "dense"], ids=lambda recipe: recipe.key)
@pytest.mark.parametrize("parts", [(), (4, 2)])
def test_dense_gradient_passes_unchanged_to_every_weight(recipe: Recipe, parts: tuple[int, ...]) -> None:
    weight, gradient = weight_and_gradient()
    assert torch.equal(latent_weight_gradient(gradient, weight, recipe, parts), gradient)


@pytest.mark.parametrize("recipe", [one for one in RECIPES if one.gradient == "masked"], ids=lambda recipe: recipe.key)
@pytest.mark.parametrize("parts", [(), (4, 2)])
def test_masked_gradient_stops_where_the_mask_is_zero(recipe: Recipe, parts: tuple[int, ...]) -> None:
    weight, gradient = weight_and_gradient()
    weight[4:] *= 50  # so that the parts change the dense codes, and with them the mask that ranks these
    before = gradient.clone()
    stopped = latent_weight_gradient(gradient, weight, recipe, parts)
    expected = np.where(oracle.weight_mask(weight.numpy(), recipe, parts), before.numpy(), 0)
    np.testing.assert_array_equal(stopped.numpy(), expected, strict=True)
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("kind", ["dense", "masked"])
def test_weight_gradient_has_the_dtype_of_the_latent_weight(kind: str) -> None:
    weight, gradient = weight_and_gradient(torch.bfloat16)
    assert latent_weight_gradient(gradient, weight, Recipe("2:4", gradient=kind), ()).dtype == torch.float32


def test_activation_gradient_only_casts() -> None:
    _, gradient = weight_and_gradient()
    assert torch.equal(activation_gradient(gradient, torch.float32), gradient)
    assert torch.equal(activation_gradient(gradient, torch.bfloat16), gradient.bfloat16())
