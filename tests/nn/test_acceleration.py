"""Packed layers on a GPU take the product that was measured to be the fastest, and it is the layer's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from sparse_bitnet import PackedLinear, Recipe, SparseBitLinear, accelerate, convert, prepare
from sparse_bitnet.nn.acceleration import compiled_products, products_of
from sparse_bitnet.nn.choosing import NEVER, Choice
from sparse_bitnet.nn.fast_weight import fast_weight

RECIPES = [
    Recipe("2:4"), Recipe("6:8"), Recipe("6:8", activations="int4"), Recipe("3:4", values="sign"), Recipe("1:2"),
]  # fmt: skip
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def network(recipe: Recipe, has_bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(192, 96, bias=has_bias), nn.SiLU(), nn.Linear(96, 64, bias=False), nn.Linear(64, 96)
    return convert(prepare(nn.Sequential(*layers), recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
def test_both_products_are_the_layer(recipe: Recipe) -> None:
    layer = network(recipe)[0]
    assert isinstance(layer, PackedLinear)
    has_fragments = 1 <= recipe.pattern.n <= recipe.pattern.m - 2
    fast, x = fast_weight(layer, has_fragments), torch.randn(2, 5, 192)
    assert torch.equal(fast(x), layer(x))
    assert torch.equal(fast.multiply_packed(x), layer(x))
    if has_fragments:
        torch.testing.assert_close(fast.multiply_sparse(x), layer(x))
        torch.testing.assert_close(replace(fast, sparse_from=10)(x), layer(x))
    flat = x.view(10, -1)
    for measured in (products_of(flat, has_fragments), compiled_products(flat, fast, has_fragments)):
        assert list(measured) == ["packed", *(["sparse"] if has_fragments else [])]
        for product in measured.values():  # what is measured is the layer's
            torch.testing.assert_close(product(fast), layer(flat))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
@pytest.mark.parametrize("parts", [(), (32, 64)], ids=str)
def test_compiled_the_product_alone_is_an_operator_and_all_is_the_layer(recipe: Recipe, parts: tuple[int, ...]) -> None:
    layer = PackedLinear.from_latent(SparseBitLinear(192, 96, recipe=recipe, parts=parts))
    fast, x = fast_weight(layer, False), torch.randn(2, 5, layer.in_features)
    graphs: list[torch.fx.GraphModule] = []
    torch.compiler.reset()

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    assert torch.equal(torch.compile(fast, backend=keep, fullgraph=True)(x), layer(x))
    assert "packed_product" in graphs[0].code and "packed_linear" not in graphs[0].code
    none = torch.zeros(0, layer.in_features)
    assert torch.compile(fast, backend=keep, fullgraph=True)(none).shape == (0, 96)
    graphs.pop()
    many = torch.randn(65, layer.in_features)
    assert torch.equal(torch.compile(fast, backend=keep, fullgraph=True)(many), layer(many))
    assert "packed_linear" in graphs[1].code


@pytest.mark.parametrize(("eager", "compiled"), [(NEVER, 8), (8, NEVER)])
def test_the_compiler_has_a_threshold_of_its_own_for_few_tokens(eager: int, compiled: int) -> None:
    layer = PackedLinear.from_latent(SparseBitLinear(192, 96, recipe=Recipe("2:4")))
    fast = replace(fast_weight(layer, True), sparse_from=eager, compiled_sparse_from=compiled)
    graphs: list[str] = []
    torch.compiler.reset()

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph.code)
        return graph.forward

    run = torch.compile(fast, backend=keep, fullgraph=True, dynamic=False)
    for tokens in (4, 8, 65):
        x = torch.randn(tokens, 192)
        torch.testing.assert_close(run(x), layer(x))
    assert ["sparse_product" in code for code in graphs] == [False, compiled == 8, eager == 8]


def test_sparse_tensor_cores_are_chosen_from_where_they_are_never_slower() -> None:
    def times(*sparse: float) -> dict[int, dict[str, float]]:
        return {n: {"packed": 2.0, "sparse": time} for n, time in zip((1, 64, 2048), sparse, strict=False)}

    ways = ("sparse", "packed")
    choice = Choice("3 layers of 64 x 32, 2:4", ways, times(1.0, 3.0, 2.0), times(2.0, 1.0))
    assert (choice.taken_from, choice.compiled_taken_from) == (2048, 1)
    assert str(choice).splitlines() == [
        "3 layers of 64 x 32, 2:4",
        "       1 tokens: packed 2.0, sparse 1.0 us: packed; compiled packed 2.0, sparse 2.0 us: sparse",
        "      64 tokens: packed 2.0, sparse 3.0 us: packed; compiled packed 2.0, sparse 1.0 us: sparse",
        "    2048 tokens: packed 2.0, sparse 2.0 us: sparse",
    ]
    none = Choice("1 layers", ways, {1: {"packed": 2.0}}, {1: {"packed": 1.0}}, "of 8, 7 are kept")
    assert (none.taken_from, none.compiled_taken_from) == (NEVER, NEVER)
    assert str(none).endswith("compiled packed 1.0 us: packed\n   no sparse: of 8, 7 are kept")


def test_a_layer_that_is_cast_and_one_that_needs_gradients_let_it_be() -> None:
    layer = network(Recipe("6:8"))[0]
    assert isinstance(layer, PackedLinear)
    layer.fast = lambda x: torch.zeros(len(x), 96)
    x = torch.randn(3, 192)
    assert not layer(x).any()
    with torch.no_grad():
        assert not layer(x.requires_grad_()).any()
    assert layer(x).any()  # x needs its gradient now
    layer.to(torch.bfloat16)
    assert layer.fast is None


@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_that_is_loaded_anew_computes_with_what_was_loaded(assign: bool) -> None:
    layer, other = network(Recipe("2:4"))[0], network(Recipe("2:4"))[0]
    assert isinstance(layer, PackedLinear) and isinstance(other, PackedLinear)
    other.weight = other.weight.flip(0)
    layer.fast, x = replace(fast_weight(layer, True), sparse_from=1), torch.randn(3, 192)
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(layer(x), other(x))


def test_what_cannot_be_accelerated_is_said() -> None:
    with pytest.raises(ValueError, match="no packed layers"):
        accelerate(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="move the model to a GPU first"):
        accelerate(network(Recipe("6:8")))


@pytest.mark.parametrize("recipe", [pytest.param(recipe, marks=gpu, id=recipe.key) for recipe in RECIPES])
def test_an_accelerated_model_computes_the_same(recipe: Recipe) -> None:
    model = network(recipe).cuda().to(torch.bfloat16)
    other = copy.deepcopy(model)
    choices = accelerate(other, (1, 300))
    assert len(choices) == 3 and all("tokens" in str(choice) for choice in choices)
    for layer in other:
        if isinstance(layer, PackedLinear) and recipe.pattern.n <= recipe.pattern.m - 2:
            layer.fast = replace(fast_weight(layer, True), sparse_from=200)
    for tokens in (1, 7, 300):
        x = torch.randn(tokens, 192, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(other(x), model(x), rtol=0.05, atol=0.05)  # an activation may round the other way
    compiled = torch.compile(other, fullgraph=True, dynamic=False)
    for tokens in (7, 300):
        x = torch.randn(tokens, 192, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), other(x), rtol=0.05, atol=0.05)
    assert list(other.state_dict()) == list(model.state_dict())
