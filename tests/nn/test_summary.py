"""The figures of `summary` against counts made by hand, and a violated pattern written into the bytes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.nn.summary import holds_pattern, summary
from sparse_bitnet.nn.swap import convert, prepare
from sparse_bitnet.recipe import NMPattern, Recipe


def small_model(recipe: Recipe) -> nn.Sequential:
    """8 -> 2 with weights whose codes are easily counted, a norm of 4 parameters, and 4 -> 3 of random weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 2), nn.LayerNorm(2), nn.Linear(4, 3, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 9.0], [1.0, 1.0, 1.0, 1.0] * 2])
    return prepare(model, recipe)


def test_figures_of_a_latent_layer() -> None:
    layer = summary(small_model(Recipe("2:4"))).layers[0]
    assert (layer.name, layer.out_features, layer.in_features) == ("0", 2, 8)
    assert (layer.pattern, layer.values, layer.format) == ("2:4", "ternary", "latent")
    assert layer.scale == (27 / 16,)
    # codes: 0 0 1 1, 0 0 0 1 | 1 1 0 0, 1 1 0 0, for 1 / 1.6875 rounds to 1 and the first two of four equals stay
    assert layer.zeros == 9 / 16
    assert layer.bits == 2.0
    assert layer.holds_pattern


def test_packed_figures_are_the_latent_ones_with_another_format() -> None:
    model = small_model(Recipe("2:4"))
    latent, packed = summary(model), summary(convert(model))
    assert [layer.zeros for layer in packed.layers] == [layer.zeros for layer in latent.layers]
    assert [layer.bits for layer in packed.layers] == [layer.bits for layer in latent.layers]
    assert [layer.format for layer in packed.layers] == ["g4", "g4"]
    assert packed.other_parameters == latent.other_parameters


def test_totals_weigh_the_layers_by_their_weights() -> None:
    whole = summary(small_model(Recipe("2:4")))
    assert whole.weights == 16 + 12
    assert whole.other_parameters == 2 + 2 * 2  # a bias, and the norm's weight and bias
    assert whole.zeros == pytest.approx((9 + round(whole.layers[1].zeros * 12)) / 28)
    assert whole.bits == 2.0
    assert whole.holds_pattern


def test_bits_count_the_bytes_that_a_row_is_filled_up_to() -> None:
    model = prepare(nn.Sequential(nn.Linear(6, 5)), Recipe("1:2"))
    assert summary(model).bits == summary(convert(model)).bits == 16 / 6


def test_full_values_count_their_own_width_and_have_no_scale() -> None:
    layer = summary(small_model(Recipe("2:4", values="full"))).layers[0]
    assert (layer.bits, layer.scale) == (32.0, ())
    assert layer.zeros == 9 / 16  # 3 4, 0 9 | 1 1, 1 1: the kept 0 is one more
    assert summary(small_model(Recipe("2:4", values="full")).bfloat16()).bits == 16.0


def test_each_part_shows_its_scale() -> None:
    model = prepare(nn.Sequential(nn.Linear(8, 2)), Recipe("2:4"), parts={"0": (1, 1)})
    model[0].weight.data = torch.tensor([[1.0] * 8, [3.0] * 8])
    assert summary(model).layers[0].scale == (1.0, 3.0)


def test_violated_pattern_is_found_in_the_bytes() -> None:
    model = convert(small_model(Recipe("2:4")))
    model[0].weight[1, 0] = 0b01_10_10_10  # three of the first four codes of the second row are 1
    whole = summary(model)
    assert [layer.holds_pattern for layer in whole.layers] == [False, True]
    assert not whole.holds_pattern
    assert "IS VIOLATED" in str(whole) and "VIOLATED" in str(whole).splitlines()[1]


def test_pattern_holds_where_a_group_has_fewer_and_not_where_it_has_more() -> None:
    pattern = NMPattern(2, 4)
    assert holds_pattern(torch.tensor([[1, 0, 0, 0, 0, 1, -1, 0]]), pattern)
    assert not holds_pattern(torch.tensor([[1, 0, 0, 0, 1, 1, -1, 0]]), pattern)
    assert holds_pattern(torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]]), pattern)  # four in a row, but of two groups


def test_a_layer_used_under_two_names_counts_once() -> None:
    layer = SparseBitLinear(8, 2, bias=False)
    whole = summary(nn.ModuleDict({"a": layer, "b": layer}))
    assert (whole.weights, whole.other_parameters) == (16, 0)


def test_table_has_a_line_a_layer_and_the_totals() -> None:
    lines = str(summary(small_model(Recipe("2:4")))).splitlines()
    assert lines[0].split() == ["layer", "shape", "pattern", "values", "format", "bits", "zeros", "scale", "n:m"]
    assert lines[1].split() == ["0", "2x8", "2:4", "ternary", "latent", "2.00", "56.2", "%", "1.69", "ok"]
    assert lines[-1].startswith("2 layers, 28 weights at 2.00 bits, ")
    assert lines[-1].endswith("6 other parameters; n:m holds everywhere")


def test_dict_goes_through_json() -> None:
    whole = summary(small_model(Recipe("2:4")))
    read = json.loads(json.dumps(whole.to_dict()))
    assert (read["weights"], read["bits"], read["holds_pattern"]) == (28, 2.0, True)
    assert read["layers"][0]["zeros"] == 9 / 16


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no sparse ternary layers: call prepare\(model, recipe\) first"):
        summary(nn.Sequential(nn.Linear(8, 2)))


def test_an_empty_packed_layer_has_only_minus_ones_and_breaks_its_pattern() -> None:
    whole = summary(nn.Sequential(PackedLinear(8, 2, bias=False)))
    assert (whole.zeros, whole.holds_pattern) == (0.0, False)
