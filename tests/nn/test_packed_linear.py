"""`PackedLinear` against the latent layer that it was packed from, and its dtypes against every cast of a model.

Shapes: T tokens, O out_features, I in_features, P parts, B bytes a row.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from numerics import oracle
from numerics.recipes import quantizing_recipes
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.numerics import ternary
from sparse_bitnet.recipe import Recipe

RECIPES = quantizing_recipes("3:4")
PARTS = [(), (12, 8, 4), (2, 4)]


def latent_layer(recipe: Recipe | None = None, parts: tuple[int, ...] = (), bias: bool = True) -> SparseBitLinear:
    torch.manual_seed(0)
    return SparseBitLinear(52, 24, bias, recipe=recipe or Recipe("3:4"), parts=parts)


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
def test_codes_survive_packing_and_the_scale_is_rounded_to_fp16(recipe: Recipe, parts: tuple[int, ...]) -> None:
    layer = latent_layer(recipe, parts)
    codes, scale = layer.quantize_weight()
    packed = PackedLinear.from_latent(layer)
    assert torch.equal(packed.codes(), codes)
    assert packed.weight.dtype == torch.uint8
    assert packed.weight_scale.dtype == torch.float32
    assert torch.equal(packed.weight_scale, scale.half().float())
    assert (packed.recipe, packed.parts) == (recipe, parts)


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
def test_forward_follows_the_oracle(recipe: Recipe, parts: tuple[int, ...]) -> None:
    layer = latent_layer(recipe, parts)
    x = torch.randn(2, 5, 52)
    codes, scale = oracle.quantize_weight(oracle.array(layer.weight), recipe, parts)
    row_scale = oracle.scale_of_rows(scale.astype(np.float16).astype(np.float32), 24, parts)[:, 0]
    expected = oracle.integer_linear(x.numpy(), codes, row_scale, recipe.activations) + oracle.array(layer.bias)
    np.testing.assert_allclose(PackedLinear.from_latent(layer)(x), expected, rtol=1e-5, atol=1e-5)


def test_forward_is_near_the_latent_one() -> None:
    layer, x = latent_layer(), torch.randn(9, 52)
    near = {"rtol": 2**-11, "atol": 1e-6}  # the scale is rounded to fp16, to 2^-12 of itself or better
    latent, packed = layer(x) - layer.bias, PackedLinear.from_latent(layer)(x) - layer.bias
    torch.testing.assert_close(packed, latent, **near)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scale_stays_fp32_when_the_model_is_cast(dtype: torch.dtype) -> None:
    packed = PackedLinear.from_latent(latent_layer(parts=(12, 8, 4)))
    model, scale, weight = nn.Sequential(packed), packed.weight_scale.clone(), packed.weight.clone()
    model.to(dtype)
    assert packed.weight_scale.dtype == torch.float32
    assert torch.equal(packed.weight_scale, scale)
    assert torch.equal(packed.weight, weight)
    assert packed.bias is not None and packed.bias.dtype == dtype
    assert model(torch.randn(3, 52, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_scale_stays_fp32_under_every_cast_method(cast: str) -> None:
    packed = PackedLinear.from_latent(latent_layer())
    scale = packed.weight_scale.clone()
    getattr(packed, cast)()
    assert packed.weight_scale.dtype == torch.float32
    assert torch.equal(packed.weight_scale, scale)
    assert packed.state_dict()["weight_scale"] is not None


def test_scale_follows_the_device_through_a_cast() -> None:
    packed = PackedLinear.from_latent(latent_layer()).to(device="meta", dtype=torch.bfloat16)
    for tensor in (packed.weight, packed.weight_scale, packed.bias):
        assert tensor is not None and tensor.device.type == "meta"
    assert packed.weight_scale.dtype == torch.float32
    assert packed(torch.empty(3, 52, device="meta", dtype=torch.bfloat16)).shape == (3, 24)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
def test_scale_is_representable_in_fp16(recipe: Recipe) -> None:
    for magnitude in (1e-7, 1e-4, 1.0, 1e4):
        layer = latent_layer(recipe, (12, 8, 4))
        layer.weight.data *= magnitude
        scale = PackedLinear.from_latent(layer).weight_scale
        assert bool((scale > 0).all())
        assert torch.equal(scale.half().float(), scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite_is_refused_by_name(value: float) -> None:
    layer = latent_layer()
    layer.weight.data[3, 5] = value
    with pytest.raises(ValueError, match=r"^model\.layers\.3\.up: the weight holds NaN or infinity"):
        PackedLinear.from_latent(layer, name="model.layers.3.up")


def test_scale_beyond_fp16_is_refused_by_name() -> None:
    layer = latent_layer()
    layer.weight.data.fill_(65505.0)
    with pytest.raises(ValueError, match=r"^model\.layers\.3\.up: scale 6.55e\+04 is beyond fp16, .* 65504"):
        PackedLinear.from_latent(layer, name="model.layers.3.up")
    layer.weight.data.fill_(65504.0)
    assert PackedLinear.from_latent(layer).weight_scale.item() == 65504.0


def test_full_values_are_refused() -> None:
    with pytest.raises(ValueError, match="values='full'"):
        PackedLinear.from_latent(latent_layer(Recipe("2:4", values="full")))
    with pytest.raises(ValueError, match="values='full'"):
        PackedLinear(52, 24, recipe=Recipe("2:4", values="full"))


def test_unknown_format_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="format 'i3' is unknown"):
        PackedLinear.from_latent(latent_layer(), "i3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_to_linear_holds_the_effective_weight(dtype: torch.dtype, bias: bool, parts: tuple[int, ...]) -> None:
    layer = latent_layer(parts=parts, bias=bias)
    packed = PackedLinear.from_latent(layer)
    linear = packed.to_linear(dtype)
    expected = ternary.dequantize_weight(layer.quantize_weight()[0], packed.weight_scale, parts, dtype)
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, expected)
    assert (linear.bias is not None) == bias
    if bias:
        assert torch.equal(linear.bias, layer.bias.to(dtype))


def test_to_linear_computes_the_same_where_activations_are_not_quantised() -> None:
    packed = PackedLinear.from_latent(latent_layer(Recipe("3:4", activations="none")))
    x = torch.randn(9, 52)
    torch.testing.assert_close(packed.to_linear(torch.float32)(x), packed(x), rtol=1e-5, atol=1e-6)


def test_packing_leaves_the_latent_layer_alone() -> None:
    layer = latent_layer()
    before = copy.deepcopy(layer.state_dict())
    PackedLinear.from_latent(layer)
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nothing_in_it_trains(training: bool) -> None:
    packed = PackedLinear.from_latent(latent_layer().train(training))
    assert packed.training == training
    assert not any(parameter.requires_grad for parameter in packed.parameters())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_state_dict_loads_into_an_empty_layer(bias: bool, parts: tuple[int, ...]) -> None:
    packed = PackedLinear.from_latent(latent_layer(parts=parts, bias=bias))
    empty = PackedLinear(52, 24, bias, recipe=packed.recipe, parts=parts)
    assert set(empty.state_dict()) == {"weight", "weight_scale", *(["bias"] if bias else [])}
    assert empty.weight.shape == (24, 13)
    assert empty.weight_scale.shape == (max(1, len(parts)),)
    empty.load_state_dict(packed.state_dict())
    x = torch.randn(3, 52)
    assert torch.equal(empty(x), packed(x))


def test_latent_weights_do_not_load_into_it() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        PackedLinear(52, 24).load_state_dict(latent_layer().state_dict(), strict=False)


def test_autocast_input_keeps_its_dtype() -> None:
    packed, x = PackedLinear.from_latent(latent_layer()), torch.randn(3, 52)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x.bfloat16()), packed(x.bfloat16().float()).bfloat16())


def test_repr_names_format_pattern_and_values() -> None:
    assert repr(PackedLinear.from_latent(latent_layer(), "i2")) == (
        "PackedLinear(in_features=52, out_features=24, bias=True, format=i2, pattern=3:4, values=ternary)"
    )


@pytest.mark.parametrize("recipe", quantizing_recipes("3:4")[:3], ids=lambda recipe: recipe.key)
@pytest.mark.parametrize("parts", [(), (12, 8, 4)], ids=str)
def test_compiled_without_a_graph_break_equals_eager(recipe: Recipe, parts: tuple[int, ...]) -> None:
    packed, x = PackedLinear.from_latent(latent_layer(recipe, parts)), torch.randn(2, 5, 52)
    torch.compiler.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), packed(x))
