"""The op `effective_weight` against `numerics` and the NumPy oracle, forward and backward: equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from numerics import oracle
from numerics.recipes import all_recipes
from sparse_bitnet.kernels.effective_weight import effective_weight
from sparse_bitnet.numerics import ternary
from sparse_bitnet.recipe import Recipe

PATTERNS = ["2:4", "6:8", "8:8"]
RECIPES = [recipe for pattern in PATTERNS for recipe in all_recipes(pattern, activations=("int8",))]
PARTS = [(), (4, 2), (1, 1, 1)]


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    return (weight * torch.arange(1, shape[-2] + 1).unsqueeze(-1)).requires_grad_()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
def test_equals_numerics_and_the_oracle(recipe: Recipe) -> None:
    for parts in PARTS:
        weight = random_weight(6, 24)
        effective = effective_weight(weight, recipe, parts, torch.float32)
        assert torch.equal(effective, ternary.effective_weight(weight, recipe, parts, torch.float32))
        np.testing.assert_array_equal(effective.detach(), oracle.effective_weight(oracle.array(weight), recipe, parts))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_equals_numerics_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    weight = random_weight(6, 24)
    for recipe in all_recipes("6:8", activations=("int8",)):
        effective = effective_weight(weight, recipe, (4, 2), dtype)
        assert effective.dtype == dtype
        assert torch.equal(effective, ternary.effective_weight(weight, recipe, (4, 2), dtype))


def test_equals_the_oracle_for_experts() -> None:
    weight = random_weight(3, 6, 8)
    for recipe in all_recipes("2:4", activations=("int8",)):
        effective = effective_weight(weight, recipe, (), torch.float32).detach()
        np.testing.assert_array_equal(effective, oracle.effective_weight(oracle.array(weight), recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
def test_gradient_is_the_upstream_one_or_that_under_the_mask(recipe: Recipe) -> None:
    for parts in PARTS:
        weight = random_weight(6, 24)
        upstream = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
        effective_weight(weight, recipe, parts, torch.float32).backward(upstream)
        expected = upstream.numpy()
        if recipe.gradient == "masked":
            expected = np.where(oracle.weight_mask(oracle.array(weight), recipe, parts), expected, 0)
        np.testing.assert_array_equal(weight.grad, expected)


def test_dense_gradient_reaches_masked_weights() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    effective_weight(weight, Recipe("2:4"), (), torch.float32).backward(torch.tensor([[5.0, 6.0, 7.0, 8.0]]))
    assert weight.grad is not None and weight.grad.tolist() == [[5.0, 6.0, 7.0, 8.0]]


def test_masked_gradient_stops_at_masked_weights() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    recipe = Recipe("2:4", gradient="masked")
    effective_weight(weight, recipe, (), torch.float32).backward(torch.tensor([[5.0, 6.0, 7.0, 8.0]]))
    assert weight.grad is not None and weight.grad.tolist() == [[0.0, 0.0, 7.0, 8.0]]


def test_gradient_of_a_bf16_effective_weight_is_fp32() -> None:
    weight = random_weight(6, 24)
    upstream = torch.randn(6, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    effective_weight(weight, Recipe("6:8"), (), torch.bfloat16).backward(upstream)
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, upstream.float())


def test_full_dense_weight_is_passed_on_as_it_is() -> None:
    weight = random_weight(6, 24)
    assert effective_weight(weight, Recipe("8:8", values="full"), (), torch.float32) is weight


@pytest.mark.parametrize("recipe", [Recipe("6:8"), Recipe("2:4", values="sign", gradient="masked")])
def test_op_keeps_the_rules_of_torch_library(recipe: Recipe) -> None:
    op = torch.ops.sparse_bitnet.effective_weight.default
    torch.library.opcheck(op, (random_weight(6, 24), recipe.key, [4, 2], torch.float32))
    torch.library.opcheck(op, (random_weight(6, 24).detach(), recipe.key, [], torch.bfloat16))
