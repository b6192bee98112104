"""`SparseBitLinear` against the NumPy oracle, forward and backward, and against the promise that it is an `nn.Linear`.

Shapes: T tokens, O out_features, I in_features.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from numerics import oracle
from numerics.recipes import all_recipes
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.numerics import activation, ternary
from sparse_bitnet.recipe import Recipe

COMPILED = [
    (Recipe("6:8"), ()),
    (Recipe("2:4", activations="none", mask_from="quantized", gradient="masked"), (12, 8, 4)),
    (Recipe("3:4", values="sign", activations="int4"), (2, 4)),
    (Recipe("8:8", values="full"), ()),
]


def layer_and_input(
    recipe: Recipe, parts: tuple[int, ...] = (), bias: bool = True
) -> tuple[SparseBitLinear, torch.Tensor]:
    torch.manual_seed(0)
    layer = SparseBitLinear(48, 24, bias, recipe=recipe, parts=parts)
    return layer, torch.randn(9, 48, requires_grad=True)


def assert_near(tensor: torch.Tensor | None, expected: np.ndarray) -> None:
    """Within 1e-5 of the largest value: fp32 sums of 48 products round to about 1e-6 of it."""
    assert tensor is not None
    np.testing.assert_allclose(tensor.detach().numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("parts", [(), (12, 8, 4)], ids=str)
@pytest.mark.parametrize("recipe", all_recipes("6:8"), ids=lambda recipe: recipe.key)
def test_forward_and_backward_follow_the_oracle(recipe: Recipe, parts: tuple[int, ...]) -> None:
    layer, x = layer_and_input(recipe, parts)
    y = layer(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    weight, bias = oracle.array(layer.weight), oracle.array(layer.bias)
    assert_near(y, oracle.linear(oracle.array(x), weight, bias, recipe, parts))
    gradients = oracle.linear_gradients(upstream.numpy(), oracle.array(x), weight, recipe, parts)
    for tensor, expected in zip((x.grad, layer.weight.grad, layer.bias.grad), gradients, strict=True):
        assert_near(tensor, expected)


def test_masked_weights_learn() -> None:
    layer, x = layer_and_input(Recipe("2:4"))
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert bool((layer.weight.grad != 0).all())


def test_forward_takes_any_leading_dimensions() -> None:
    layer, x = layer_and_input(Recipe("6:8"))
    assert torch.equal(layer(x.reshape(3, 1, 3, 48)), layer(x).reshape(3, 1, 3, 24))
    assert layer(x[:0]).shape == (0, 24)


def test_codes_are_those_of_the_forward_pass() -> None:
    layer, x = layer_and_input(Recipe("6:8", activations="none"), (12, 8, 4), bias=False)
    codes, scale = layer.quantize_weight()
    effective = ternary.dequantize_weight(codes, scale, layer.parts, torch.float32)
    assert torch.equal(layer(x), F.linear(x, effective))
    assert not scale.requires_grad


def test_under_autocast_the_codes_come_from_the_fp32_masters() -> None:
    layer, x = layer_and_input(Recipe("6:8"), (12, 8, 4))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    effective = ternary.effective_weight(layer.weight.detach(), layer.recipe, layer.parts, torch.bfloat16)
    fake = activation.fake_quantize_activation(x.detach(), "int8", torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.detach(), F.linear(fake, effective, layer.bias.detach().bfloat16()))
    y.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_under_autocast_a_bf16_tie_is_decided_by_the_masters() -> None:
    layer = SparseBitLinear(2, 1, bias=False, recipe=Recipe("1:2", activations="none"))
    layer.weight.data = torch.tensor([[1.0, 1.0 + 2**-12]])  # equal in bf16, where the first would be kept
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.tensor([[1.0, 0.0]])).item() == 0
        assert layer(torch.tensor([[0.0, 1.0]])).item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_works_in_the_dtype_of_its_weight(dtype: torch.dtype) -> None:
    layer, x = layer_and_input(Recipe("6:8"))
    layer = layer.to(dtype)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    expected = oracle.linear(
        oracle.array(x.to(dtype)), oracle.array(layer.weight), oracle.array(layer.bias), layer.recipe
    )
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-6}[dtype]
    np.testing.assert_allclose(oracle.array(y), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_is_an_nn_linear_with_the_same_state_dict() -> None:
    linear = nn.Linear(48, 24)
    layer = SparseBitLinear(48, 24)
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == list(linear.state_dict())
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight)


def test_recipe_is_the_papers_unless_given() -> None:
    assert SparseBitLinear(48, 24).recipe == Recipe("6:8")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_from_linear_shares_the_parameters(bias: bool, training: bool) -> None:
    linear = nn.Linear(48, 24, bias).train(training)
    layer = SparseBitLinear.from_linear(linear, Recipe("2:4"), (12, 8, 4))
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert (layer.training, layer.recipe, layer.parts) == (training, Recipe("2:4"), (12, 8, 4))


def test_from_linear_leaves_the_parameters_on_their_device() -> None:
    assert SparseBitLinear.from_linear(nn.Linear(48, 24, device="meta"), Recipe("6:8")).weight.is_meta
    assert not SparseBitLinear.from_linear(nn.Linear(48, 24), Recipe("6:8")).weight.is_meta


def test_forward_gives_a_shape_on_the_meta_device() -> None:
    layer = SparseBitLinear(48, 24, device="meta")
    assert layer(torch.empty(3, 48, device="meta")).shape == (3, 24)


def test_full_dense_recipe_is_a_plain_linear_over_quantised_activations() -> None:
    layer, x = layer_and_input(Recipe("8:8", values="full", activations="none"))
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_width_that_does_not_divide_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="in_features=44 is not a multiple of m=8"):
        SparseBitLinear(44, 24, recipe=Recipe("6:8"))


def test_copies_keep_recipe_and_parts() -> None:
    layer, x = layer_and_input(Recipe("2:4"), (12, 8, 4))
    twin = copy.deepcopy(layer)
    assert (twin.recipe, twin.parts) == (layer.recipe, layer.parts)
    assert torch.equal(twin(x), layer(x))


def test_repr_names_pattern_and_values() -> None:
    assert repr(SparseBitLinear(48, 24, recipe=Recipe("3:4", values="sign"))) == (
        "SparseBitLinear(in_features=48, out_features=24, bias=True, pattern=3:4, values=sign)"
    )


@pytest.mark.parametrize(("recipe", "parts"), COMPILED, ids=lambda case: getattr(case, "key", str(case)))
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_compiled_without_a_graph_break_equals_eager(recipe: Recipe, parts: tuple[int, ...], autocast: bool) -> None:
    layer, x = layer_and_input(recipe, parts)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for forward in (layer, compiled):
        layer.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = forward(x)
        y.float().square().sum().backward()
        results.append((y, x.grad, layer.weight.grad, layer.bias.grad))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)
