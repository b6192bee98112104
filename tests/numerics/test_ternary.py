"""Scale, codes and effective weight against the NumPy oracle and against numbers worked out by hand: equal, not close.

Shapes: O out_features, I in_features, P parts, E experts.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from numerics import oracle
from numerics.recipes import all_recipes, quantizing_recipes
from sparse_bitnet.numerics.ternary import (
    absmean_scale,
    dequantize_weight,
    effective_weight,
    kept_absmean_scale,
    quantize_weight,
    scale_by_row,
    sign_codes,
    ternary_codes,
    weight_mask,
)
from sparse_bitnet.recipe import Recipe

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RECIPES = quantizing_recipes("3:4", activations=("int8",))
SHAPES = [(1, 4), (1, 36), (7, 12), (33, 132), (64, 64)]


def random_weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def assert_quantizes_as_oracle(weight: torch.Tensor, recipe: Recipe, parts: tuple[int, ...] = ()) -> None:
    codes, scale = quantize_weight(weight, recipe, parts)
    expected_codes, expected_scale = oracle.quantize_weight(oracle.array(weight), recipe, parts)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    np.testing.assert_array_equal(scale.numpy(), expected_scale, strict=True)
    np.testing.assert_array_equal(codes.numpy(), expected_codes, strict=True)


def test_codes_round_half_to_even_and_clip() -> None:
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5], [0.501, -0.499, 3.0, 0.0]])
    assert ternary_codes(weight, torch.tensor([1.0])).tolist() == [[0, 0, 1, -1], [1, 0, 1, 0]]


def test_paper_recipe_by_hand() -> None:
    weight = torch.tensor([[0.25, -1.0, 2.0, 0.75], [1.0, 1.0, 1.0, -1.0]])  # mean magnitude 1
    codes, scale = quantize_weight(weight, Recipe("2:4"))
    assert scale.tolist() == [1.0]
    assert codes.tolist() == [[0, -1, 1, 0], [1, 1, 0, 0]]


def test_scale_of_the_paper_is_that_of_the_dense_weight() -> None:
    weight = torch.tensor([[4.0, 3.0, 2.0, -1.0]])
    _, dense_first = quantize_weight(weight, Recipe("2:4"))
    _, mask_first = quantize_weight(weight, Recipe("2:4", order="mask-then-quant"))
    assert (dense_first.item(), mask_first.item()) == (2.5, 1.75)


def test_mask_from_quantized_ranks_codes_and_not_magnitudes() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 0.0]])  # scale 1.5, dense codes 1 1 1 0
    latent, _ = quantize_weight(weight, Recipe("2:4"))
    quantized, _ = quantize_weight(weight, Recipe("2:4", mask_from="quantized"))
    assert latent.tolist() == [[0, 1, 1, 0]]
    assert quantized.tolist() == [[1, 1, 0, 0]]


def test_sign_of_zero_is_plus_one() -> None:
    assert sign_codes(torch.tensor([[0.0, -0.0, -2.0, 1e-45, -1e-45]])).tolist() == [[1, 1, -1, 1, -1]]


def test_sign_keeps_no_zero_and_takes_the_mean_of_the_kept_weights() -> None:
    codes, scale = quantize_weight(torch.tensor([[0.0, -3.0, 0.0, 0.0]]), Recipe("3:4", values="sign"))
    assert codes.tolist() == [[1, -1, 1, 0]]
    assert scale.tolist() == [1.0]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantizes_as_the_oracle(recipe: Recipe, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        assert_quantizes_as_oracle(random_weight(*shape, seed=seed, dtype=dtype), recipe)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "6:8", "8:8", "5:9", "31:32"])
def test_quantizes_as_the_oracle_for_other_patterns(pattern: str) -> None:
    weight = random_weight(5, 288)
    for recipe in quantizing_recipes(pattern, activations=("none",)):
        assert_quantizes_as_oracle(weight, recipe)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -2.0, 1e-6, 1e-40]), min_size=12, max_size=12),
    st.sampled_from(RECIPES),
    st.sampled_from([(1, 12), (3, 4)]),
)
def test_quantizes_as_the_oracle_on_ties_and_halves(
    values: list[float], recipe: Recipe, shape: tuple[int, int]
) -> None:
    assert_quantizes_as_oracle(torch.tensor(values).reshape(shape), recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-40, 1e-6])
def test_scale_never_falls_below_its_floor(recipe: Recipe, value: float) -> None:
    weight = torch.full((3, 8), value)
    assert_quantizes_as_oracle(weight, recipe)
    codes, scale = quantize_weight(weight, recipe)
    assert scale.item() == np.float32(1e-5)
    assert bool(codes.any()) == (recipe.values == "sign")


@pytest.mark.parametrize(("rows", "parts"), [(7, (4, 2, 1)), (12, (1, 1, 1)), (12, (2, 1)), (6, (3, 3)), (5, (5,))])
def test_each_part_has_a_scale_of_its_own(rows: int, parts: tuple[int, ...]) -> None:
    weight = random_weight(rows, 12) * torch.arange(1, rows + 1).unsqueeze(-1)
    for recipe in RECIPES:
        assert_quantizes_as_oracle(weight, recipe, parts)
        assert quantize_weight(weight, recipe, parts)[1].unique().numel() == len(parts)


def test_stacked_parts_equal_the_matrices_one_by_one() -> None:
    matrices = [random_weight(rows, 8, seed=rows) * rows for rows in (4, 2, 3)]
    codes, scale = quantize_weight(torch.cat(matrices), Recipe("6:8"), (4, 2, 3))
    alone = [quantize_weight(matrix, Recipe("6:8")) for matrix in matrices]
    assert torch.equal(codes, torch.cat([one for one, _ in alone]))
    assert torch.equal(scale, torch.cat([one for _, one in alone]))


def test_interleaved_parts_equal_the_matrices_one_by_one() -> None:
    q, k, v = (random_weight(6, 8, seed=seed) * (seed + 1) for seed in range(3))
    fused = torch.stack([matrix.reshape(3, 2, 8) for matrix in (q, k, v)], dim=1).flatten(0, 2)  # 3 heads of 2 rows
    codes, scale = quantize_weight(fused, Recipe("6:8"), (2, 2, 2))
    by_matrix = codes.reshape(3, 3, 2, 8).transpose(0, 1).reshape(3, 6, 8)
    for index, matrix in enumerate((q, k, v)):
        expected_codes, expected_scale = quantize_weight(matrix, Recipe("6:8"))
        assert torch.equal(by_matrix[index], expected_codes)
        assert torch.equal(scale[index : index + 1], expected_scale)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
def test_each_expert_has_a_scale_of_its_own(recipe: Recipe) -> None:
    weight = random_weight(3, 6, 8) * torch.tensor([1.0, 5.0, 0.1]).reshape(3, 1, 1)
    assert_quantizes_as_oracle(weight, recipe)
    assert_quantizes_as_oracle(weight, recipe, (4, 2))
    assert quantize_weight(weight, recipe)[1].shape == (3, 1)
    assert quantize_weight(weight, recipe, (4, 2))[1].shape == (3, 2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("cut", [1, 100, 511])
def test_scale_is_the_same_from_two_shards(cut: int, dtype: torch.dtype) -> None:
    for seed in range(5):
        weight = random_weight(512, 96, seed=seed, dtype=dtype)
        sums = [shard.abs().sum(dtype=torch.float64) for shard in (weight[:cut], weight[cut:])]
        assert torch.equal(absmean_scale(weight), ((sums[0] + sums[1]) / weight.numel()).float().reshape(1))


def test_scale_does_not_depend_on_the_order_of_addition() -> None:
    weight = random_weight(64, 96)
    shuffled = weight.flatten()[torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(1))]
    for reordered in (weight.flip(0), weight.T, weight.reshape(1, -1), shuffled.reshape(64, 96)):
        assert torch.equal(absmean_scale(reordered), absmean_scale(weight))


def test_scale_counts_small_weights_beside_a_large_one() -> None:
    weight = torch.full((1, 1024), 1.0)
    weight[0, 0] = 2.0**30  # in fp32 the sum would stay at 2^30, and lose 1023
    assert absmean_scale(weight).item() == np.float32((2**30 + 1023) / 1024)


def test_kept_scale_counts_the_kept_weights_of_each_part() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    assert kept_absmean_scale(weight, mask).tolist() == [3.5]
    assert kept_absmean_scale(weight, mask, (1, 2)).tolist() == [1.0, np.float32(13 / 3)]


def test_scale_by_row_repeats_the_parts() -> None:
    scale = torch.tensor([1.0, 2.0])
    assert scale_by_row(scale, (1, 2), 6).flatten().tolist() == [1, 2, 2, 1, 2, 2]
    assert scale_by_row(scale[:1], (), 6).shape == (1, 1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("recipe", all_recipes("2:4", activations=("int8",)), ids=lambda recipe: recipe.key)
def test_effective_weight_equals_the_oracle(recipe: Recipe, dtype: torch.dtype) -> None:
    for parts in ((), (4, 2)):
        weight = random_weight(6, 12)
        effective = effective_weight(weight, recipe, parts, dtype)
        expected = torch.from_numpy(oracle.effective_weight(oracle.array(weight), recipe, parts)).to(dtype)
        assert effective.dtype == dtype
        assert torch.equal(effective, expected)


def test_dequantized_codes_are_the_effective_weight() -> None:
    weight = random_weight(6, 8)
    for recipe in RECIPES:
        codes, scale = quantize_weight(weight, recipe, (4, 2))
        effective = dequantize_weight(codes, scale, (4, 2), torch.float32)
        assert torch.equal(effective, effective_weight(weight, recipe, (4, 2), torch.float32))


def test_codes_are_zero_where_the_mask_is() -> None:
    weight = random_weight(6, 8)
    for recipe in RECIPES:
        assert not bool(quantize_weight(weight, recipe)[0][~weight_mask(weight, recipe)].any())


@pytest.mark.parametrize("recipe", all_recipes("3:4", activations=("int8",)), ids=lambda recipe: recipe.key)
def test_latent_weight_is_not_changed(recipe: Recipe) -> None:
    weight = random_weight(6, 8)
    before = weight.clone()
    effective_weight(weight, recipe, (), torch.float32)
    assert torch.equal(weight, before)


def test_full_values_have_no_codes() -> None:
    with pytest.raises(ValueError, match="values='full' have no codes"):
        quantize_weight(torch.ones(2, 8), Recipe("6:8", values="full"))


def test_parts_that_do_not_divide_the_height_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"7 rows do not divide into parts of \(4, 2\)"):
        absmean_scale(torch.ones(7, 8), (4, 2))
