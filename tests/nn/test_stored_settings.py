"""`StoredSettings` against the JSON that it is stored as: what comes back, and the words for what cannot be read."""

from __future__ import annotations

import json

import pytest
from torch import nn

from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.nn.stored_settings import StoredSettings, stored_settings
from sparse_bitnet.recipe import Recipe

SETTINGS = StoredSettings(
    Recipe("2:4", activations="int4"), "i2", ("lm_head", "model.head"), {"layers.0.qkv_proj": (64, 32, 32)}
)
STORED = {
    "quant_method": "sparse_bitnet",
    "version": 1,
    "format": "i2",
    "pattern": "2:4",
    "values": "ternary",
    "activations": "int4",
    "order": "quant-then-mask",
    "mask_from": "latent",
    "gradient": "dense",
    "ignore": ["lm_head", "model.head"],
    "parts": {"layers.0.qkv_proj": [64, 32, 32]},
}


def test_stored_form_is_spelled_out() -> None:
    assert SETTINGS.to_dict() == STORED


def test_json_brings_the_settings_back() -> None:
    assert StoredSettings.from_dict(json.loads(json.dumps(SETTINGS.to_dict()))) == SETTINGS


def test_reading_does_not_change_what_is_read() -> None:
    stored = json.loads(json.dumps(STORED))
    StoredSettings.from_dict(stored)
    assert stored == STORED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "bitnet"}, "quant_method='bitnet' is not 'sparse_bitnet'"),
        ({"version": 2}, "version 2 is unknown, this package reads version 1"),
        ({"pattern": "5:4"}, "pattern 5:4: n must lie between 1 and m=4"),
        ({"activations": "int9"}, "activations='int9' is not one of int8, int4, none"),
        ({"format": "i3"}, "format 'i3' is unknown"),
        ({"values": "full"}, "values='full' are not ternary"),
        ({"ignore": None}, "quantization_config: "),
        ({"parts": [1]}, "quantization_config: "),
        ({"sparsity": 0.5}, "unknown recipe setting 'sparsity'"),
    ],
    ids=str,
)
def test_unreadable_settings_are_refused_in_one_line(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"^quantization_config: ") as refusal:
        StoredSettings.from_dict(STORED | change)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("missing", ["format", "ignore", "parts"])
def test_missing_setting_is_refused_by_name(missing: str) -> None:
    with pytest.raises(ValueError, match=f"quantization_config: '{missing}' is missing"):
        StoredSettings.from_dict({key: value for key, value in STORED.items() if key != missing})


def test_full_values_may_be_stored_as_latent_weights() -> None:
    assert StoredSettings.from_dict(STORED | {"values": "full", "format": "latent"}).recipe.values == "full"


def test_settings_of_a_model_name_its_plain_linear_layers_and_its_parts() -> None:
    recipe = Recipe("2:4")
    model = nn.ModuleDict(
        {
            "a": SparseBitLinear(8, 6, recipe=recipe, parts=(4, 2)),
            "b": SparseBitLinear(8, 6, recipe=recipe),
            "head": nn.Linear(8, 6),
        }
    )
    assert stored_settings(model) == StoredSettings(recipe, "latent", ("head",), {"a": (4, 2)})


@pytest.mark.parametrize(
    "other", [SparseBitLinear(8, 6, recipe=Recipe("6:8")), PackedLinear(8, 6, recipe=Recipe("2:4"))], ids=repr
)
def test_layers_that_disagree_have_no_settings(other: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"a checkpoint holds one recipe and one format, the layers have 2:4,.* and "):
        stored_settings(nn.Sequential(SparseBitLinear(8, 6, recipe=Recipe("2:4")), other))


def test_a_plain_model_has_no_settings() -> None:
    with pytest.raises(ValueError, match=r"no sparse ternary layers: call prepare\(model, recipe\) first"):
        stored_settings(nn.Sequential(nn.Linear(8, 6)))
