"""A run's key changes with every setting, and functions that make runs give the settings that they are named for."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from experiments.settings import PAPER, SHAPES, Run, full_precision, sign, ternary, turning_sparse
from sparse_bitnet import NMPattern, Recipe

RUN = ternary(PAPER, "1.8m", "6:8", 0, 4e-3)
OTHER = {
    "size": "4.8m", "recipe": Recipe("5:8"), "seed": 1, "learning_rate": 1e-3, "tokens": 131_072, "sequence": 128,
    "batch": 256, "dense_until": 0.5, "residual": 1.0, "decay_until": None, "weight_decay": 0.0, "warmup_steps": 10,
    "final_rate_share": 0.0, "clip": 2.0, "beta1": 0.8, "beta2": 0.99, "zero_shot": True,
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in fields(Run)])
def test_the_key_changes_with_every_setting(field: str) -> None:
    assert replace(RUN, **{field: OTHER[field]}).key != RUN.key
    assert replace(RUN, **{field: getattr(RUN, field)}).key == RUN.key


@pytest.mark.parametrize("field", ["values", "activations", "order", "mask_from", "gradient"])
def test_and_with_every_choice_of_the_recipe(field: str) -> None:
    other = {
        "values": "sign",
        "activations": "int4",
        "order": "mask-then-quant",
        "mask_from": "quantized",
        "gradient": "masked",
    }
    assert replace(RUN, recipe=replace_recipe(RUN.recipe, **{field: other[field]})).key != RUN.key


def replace_recipe(recipe: Recipe, **settings: str) -> Recipe:
    return Recipe.from_dict({**recipe.to_dict(), **settings})


def test_the_shapes_are_those_that_their_names_say() -> None:
    assert SHAPES["1.8m"].weights == 4 * (4 * 192 * 192 + 3 * 192 * 512)
    assert {size: round(shape.weights / 1e6, 1) for size, shape in SHAPES.items() if size != "toy"} == {
        "1.8m": 1.8, "4.8m": 4.8, "21m": 21.2,
    }  # fmt: skip
    assert RUN.steps == 176_947_200 // 131_072
    assert all(shape.hidden == 64 * shape.heads for shape in SHAPES.values())


def test_sizes_of_the_smallest_ones_ratio() -> None:
    assert PAPER.of_one_ratio == ("1.8m", "4.8m")
    assert PAPER.tokens_each("4.8m") == pytest.approx(PAPER.tokens_each("1.8m"))


def test_both_precisions_share_all_but_what_tells_them_apart() -> None:
    one, other = full_precision(PAPER, "1.8m", "6:8", 0, 4e-3), RUN
    assert (one.recipe.values, one.recipe.activations) == ("full", "none")
    assert (one.decay_until, other.decay_until) == (None, 0.5)
    assert replace(one, recipe=other.recipe, decay_until=other.decay_until) == other


def test_wider_models_learn_more_slowly_by_the_same_rule() -> None:
    for make in (full_precision, ternary):
        assert make(PAPER, "21m", "6:8", 0, 4e-3).learning_rate == pytest.approx(2e-3)
        assert make(PAPER, "1.8m", "6:8", 0, 4e-3).learning_rate == 4e-3
    assert [make(PAPER, size, "6:8", 0, 1.0).zero_shot for size in PAPER.sizes] == [False, False, True]


def test_schedules() -> None:
    turning = turning_sparse(PAPER, "1.8m", "6:8", 0, 4e-3, 0.25)
    steps = turning.steps
    assert turning.schedule().pattern_at(steps // 4 - 1, steps) == NMPattern(8, 8)
    assert turning.schedule().pattern_at(steps // 4 + 1, steps) == NMPattern(6, 8)
    sherry = sign(PAPER, "1.8m", "3:4", 0, 4e-3, residual=1.0)
    assert sherry.residual_schedule().share_at(steps - 1, steps) == 0
    assert RUN.residual_schedule() is None
