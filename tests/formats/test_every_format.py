"""What holds for every format: exact round trips of whatever it is for, rows on bytes, damage that is found.

Shapes: O out_features, I in_features, B bytes a row.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_bitnet.formats import FORMATS, Format, choose_format, get_format
from sparse_bitnet.numerics.ternary import quantize_weight
from sparse_bitnet.recipe import Recipe

RECIPES = {
    "i2": [Recipe("6:8"), Recipe("3:5"), Recipe("5:7", values="sign")],
    "t5": [Recipe("6:8"), Recipe("3:5"), Recipe("5:7", values="sign")],
    "g4": [Recipe("2:4"), Recipe("1:4"), Recipe("2:8"), Recipe("1:8", values="sign")],
    "g4s2": [Recipe("2:4", values="sign")],
    "g4s3": [Recipe("3:4", values="sign")],
}
CASES = [(get_format(name), recipe) for name, recipes in RECIPES.items() for recipe in recipes]


def label(case: object) -> str:
    return case.name if isinstance(case, Format) else case.key if isinstance(case, Recipe) else str(case)


def trained_codes(recipe: Recipe, *shape: int, seed: int = 0) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return quantize_weight(weight, recipe)[0]


def test_every_format_is_tested() -> None:
    assert set(RECIPES) == set(FORMATS)


@pytest.mark.parametrize(("format", "recipe"), CASES, ids=label)
@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 9), groups=st.integers(1, 40), seed=st.integers(0, 2**31 - 1))
def test_round_trip_is_exact(format: Format, recipe: Recipe, rows: int, groups: int, seed: int) -> None:
    codes = trained_codes(recipe, rows, groups * recipe.pattern.m, seed=seed)
    before = codes.clone()
    packed = format.pack(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, format.bytes_per_row(codes.shape[1]))
    assert torch.equal(format.unpack(packed, codes.shape[1]), before)
    assert torch.equal(codes, before)
    assert not format.has_invalid_codes(packed)


@pytest.mark.parametrize(("format", "recipe"), CASES, ids=label)
def test_rows_are_packed_one_by_one_and_experts_too(format: Format, recipe: Recipe) -> None:
    codes = trained_codes(recipe, 2, 3, 7 * recipe.pattern.m)
    packed = format.pack(codes)
    for expert in range(2):
        for row in range(3):
            assert torch.equal(packed[expert, row], format.pack(codes[expert, row : row + 1])[0])


@pytest.mark.parametrize(("format", "recipe"), CASES, ids=label)
def test_packs_on_the_meta_device(format: Format, recipe: Recipe) -> None:
    width = 6 * recipe.pattern.m
    packed = format.pack(torch.empty(3, width, dtype=torch.int8, device="meta"))
    assert (packed.device.type, packed.shape) == ("meta", (3, format.bytes_per_row(width)))


@pytest.mark.parametrize(("format", "recipe"), CASES, ids=label)
def test_takes_the_bits_that_it_says(format: Format, recipe: Recipe) -> None:
    width = 40 * recipe.pattern.m  # a multiple of every unit
    assert 8 * format.bytes_per_row(width) / width == format.bits


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (Recipe("6:8"), "i2"),
        (Recipe("8:8"), "i2"),
        (Recipe("2:4"), "g4"),
        (Recipe("2:8"), "g4"),
        (Recipe("1:2"), "i2"),  # pairs may straddle what the codebook counts: widths need no multiple of 4
        (Recipe("3:4"), "i2"),
        (Recipe("2:4", values="sign"), "g4s2"),
        (Recipe("3:4", values="sign"), "g4s3"),
        (Recipe("6:8", values="sign"), "i2"),
    ],
    ids=label,
)
def test_auto_takes_the_format_that_suits_the_pattern(recipe: Recipe, name: str) -> None:
    assert choose_format(recipe).name == name
    assert choose_format(recipe, name).name == name


@pytest.mark.parametrize(("recipe", "name"), [(Recipe("2:4"), "g4"), (Recipe("2:4", values="sign"), "g4s2")], ids=label)
def test_g4_takes_the_codebook_that_suits_the_values(recipe: Recipe, name: str) -> None:
    assert choose_format(recipe, "g4").name == name


@pytest.mark.parametrize(
    ("recipe", "name", "message"),
    [
        (Recipe("6:8"), "g4", "format g4 holds groups in which at most 2 of 4 are not 0"),
        (Recipe("2:4"), "g4s2", "format g4s2 .* values='ternary' with pattern 2:4 do not promise: use i2 or t5"),
        (Recipe("2:4", values="sign"), "g4s3", "format g4s3 holds groups in which exactly 3"),
    ],
    ids=label,
)
def test_a_format_that_does_not_suit_the_recipe_is_refused(recipe: Recipe, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_format(recipe, name)
