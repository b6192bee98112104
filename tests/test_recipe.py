"""`NMPattern` and `Recipe`: what they accept, what they refuse and in which words, and that text brings them back."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from sparse_bitnet.recipe import NMPattern, Recipe

VALUES = {
    "values": ["ternary", "sign", "full"],
    "activations": ["int8", "int4", "none"],
    "order": ["quant-then-mask", "mask-then-quant"],
    "mask_from": ["latent", "quantized"],
    "gradient": ["dense", "masked"],
}


@st.composite
def patterns(draw: DrawFn) -> NMPattern:
    m = draw(st.integers(2, 32))
    return NMPattern(draw(st.integers(1, m)), m)


@st.composite
def recipes(draw: DrawFn) -> Recipe:
    chosen = {field: draw(st.sampled_from(values)) for field, values in VALUES.items()}
    if chosen["values"] != "ternary":
        chosen |= {"order": "quant-then-mask", "mask_from": "latent"}
    return Recipe(draw(patterns()), **chosen)


@pytest.mark.parametrize(
    ("text", "n", "m"), [("6:8", 6, 8), (" 2 : 4 ", 2, 4), ("8:8", 8, 8), ("1:2", 1, 2), ("1:32", 1, 32)]
)
def test_pattern_parses(text: str, n: int, m: int) -> None:
    assert NMPattern.parse(text) == NMPattern(n, m)


@pytest.mark.parametrize("text", ["", "6", "6:", ":8", "6/8", "6:8:9", "a:b", "-1:4", "1.5:4", "6:8\n7"])
def test_pattern_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not of the form n:m, for example '6:8'"):
        NMPattern.parse(text)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 0), (2, 33), (1, 64)])
def test_pattern_refuses_m_out_of_range(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"pattern {n}:{m}: m must lie between 2 and 32"):
        NMPattern(n, m)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 8)])
def test_pattern_refuses_n_out_of_range(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"pattern {n}:{m}: n must lie between 1 and m={m}"):
        NMPattern(n, m)


@given(patterns())
def test_pattern_text_parses_back(pattern: NMPattern) -> None:
    assert NMPattern.parse(str(pattern)) == pattern


def test_pattern_is_dense_where_it_keeps_all() -> None:
    assert NMPattern(8, 8).is_dense
    assert not NMPattern(7, 8).is_dense


def test_pattern_checks_a_width_by_name() -> None:
    NMPattern(6, 8).check_width(64, "mlp.up")
    with pytest.raises(ValueError, match=r"^in_features=60 is not a multiple of m=8 \(mlp\.up, pattern 6:8\)$"):
        NMPattern(6, 8).check_width(60, "mlp.up")


def test_defaults_are_those_of_the_paper() -> None:
    assert Recipe().to_dict() == {
        "pattern": "6:8",
        "values": "ternary",
        "activations": "int8",
        "order": "quant-then-mask",
        "mask_from": "latent",
        "gradient": "dense",
    }


def test_pattern_may_be_text_or_a_pattern() -> None:
    assert Recipe("2:4") == Recipe(NMPattern(2, 4))


@pytest.mark.parametrize("field", VALUES)
def test_unknown_choice_is_refused_in_one_line_with_field_value_and_choices(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}='int9' is not one of") as refusal:
        Recipe("6:8", **{field: "int9"})
    message = str(refusal.value)
    assert "\n" not in message
    assert message.endswith(", ".join(VALUES[field]))


@pytest.mark.parametrize("pattern", ["6:6:6", "9:8", "0:4", 6, None])
def test_bad_pattern_is_refused_in_one_line_with_the_field(pattern: object) -> None:
    with pytest.raises(ValueError, match=r"^pattern ") as refusal:
        Recipe(pattern)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("values", ["sign", "full"])
@pytest.mark.parametrize(
    "ablation", [{"order": "mask-then-quant"}, {"mask_from": "quantized"}], ids=["order", "mask_from"]
)
def test_ablations_of_the_zeros_need_ternary_values(values: str, ablation: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"values='ternary'.*values='{values}'") as refusal:
        Recipe("6:8", values=values, **ablation)
    assert next(iter(ablation)) in str(refusal.value)


@settings(deadline=None, max_examples=100)
@given(recipes())
def test_dict_and_key_bring_a_recipe_back(recipe: Recipe) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_key(recipe.key) == recipe
    assert hash(Recipe.from_key(recipe.key)) == hash(recipe)
    assert all(type(text) is str for text in recipe.to_dict().values())


@settings(deadline=None, max_examples=100)
@given(recipes(), recipes())
def test_key_tells_recipes_apart(one: Recipe, other: Recipe) -> None:
    assert (one.key == other.key) == (one == other)


def test_missing_settings_take_their_defaults() -> None:
    assert Recipe.from_dict({"pattern": "2:4"}) == Recipe("2:4")


def test_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^unknown recipe setting 'sparsity'$"):
        Recipe.from_dict({"pattern": "2:4", "sparsity": 0.5})


@pytest.mark.parametrize(("values", "pattern", "kept"), [("full", "8:8", 1), ("full", "6:8", 0), ("ternary", "8:8", 0)])
def test_keeps_weight_only_where_nothing_is_done_to_it(values: str, pattern: str, kept: int) -> None:
    assert Recipe(pattern, values=values).keeps_weight == bool(kept)


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Recipe().values = "sign"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        NMPattern(6, 8).n = 4  # type: ignore[misc]
