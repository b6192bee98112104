"""The annealed residual: its product and gradients against fp64, nothing left of it at 0, never packed away."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_bitnet import Recipe, SparseBitLinear, convert, prepare, set_residual
from sparse_bitnet.nn.step_weights import StepWeights
from sparse_bitnet.numerics.ternary import effective_weight
from sparse_bitnet.recipe import NMPattern

SHERRY = Recipe("3:4", values="sign", activations="none")
RECIPES = [SHERRY, Recipe("6:8", activations="none"), Recipe("2:4", gradient="masked", activations="none")]


def network(recipe: Recipe) -> nn.Sequential:
    return prepare(nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 32)), recipe)


def gradients(model: nn.Module, x: Tensor, steps: StepWeights | None = None) -> list[Tensor]:
    if steps is not None:
        steps.refresh()
    loss = model(x).square().mean()
    loss.backward()
    found = [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
@pytest.mark.parametrize("by_step", [False, True])
def test_product_and_gradients_are_those_of_the_paper(recipe: Recipe, share: float, by_step: bool) -> None:
    """y = x (T scale + share W), dx through both, and dW the straight-through one of T and share times that of W."""
    layer = SparseBitLinear(32, 24, recipe=recipe)
    set_residual(layer, share)
    if by_step:
        StepWeights(layer).refresh()
    x = torch.randn(5, 32, requires_grad=True)
    y = layer(x)
    incoming = torch.randn_like(y)
    y.backward(incoming)

    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    quantised = effective_weight(layer.weight.detach(), recipe, (), torch.float32).double()
    multiplied = quantised + share * weight
    whole = incoming.double().T @ x.detach().double()
    through = whole
    if recipe.gradient == "masked":
        keeps = layer.weight.abs().view(24, -1, 4).argsort(-1, descending=True)[..., :2]  # no ties among random floats
        kept = torch.zeros(24, 8, 4, dtype=torch.bool).scatter_(-1, keeps, True).view(24, 32)
        through = whole * kept
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), F.linear(x.double(), multiplied, bias), **close)
    assert x.grad is not None and layer.weight.grad is not None
    torch.testing.assert_close(x.grad.double(), incoming.double() @ multiplied, **close)
    torch.testing.assert_close(layer.weight.grad.double(), through + share * whole, **close)


@pytest.mark.parametrize("recipe", [Recipe("6:8"), Recipe("3:4", values="sign")], ids=lambda recipe: recipe.key)
@pytest.mark.parametrize("by_step", [False, True])
def test_at_0_a_layer_is_what_it_was_without_bit_for_bit(recipe: Recipe, by_step: bool) -> None:
    plain = network(recipe)
    other = copy.deepcopy(plain)
    x = torch.randn(8, 64)
    set_residual(other, 0.5)
    assert not torch.equal(gradients(other, x)[0], gradients(plain, x)[0])
    set_residual(other, 0)
    steps = StepWeights(other) if by_step else None
    for one, another in zip(gradients(plain, x), gradients(other, x, steps), strict=True):
        assert torch.equal(one, another)


def test_evaluation_sees_the_codes_alone() -> None:
    model = network(SHERRY).eval()
    x = torch.randn(4, 64)
    before = model(x)
    set_residual(model, 1.0)
    assert torch.equal(model(x), before)
    assert not torch.equal(model.train()(x), before)


def test_compiled_code_follows_the_share_without_being_compiled_again() -> None:
    model = network(Recipe("3:4", values="sign"))
    compiles = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        compiles.append(1)
        return graph

    run = torch.compile(model, backend=backend, fullgraph=True)
    steps, x, seen = StepWeights(model), torch.randn(8, 64), []
    for share in (0.2, 1.0, 0.3):
        set_residual(model, share)
        steps.refresh()
        seen.append(run(x))
        torch.testing.assert_close(seen[-1], model(x))
    assert len(compiles) == 1
    torch.compiler.reset()


def test_it_is_not_packed_away() -> None:
    model = network(SHERRY)
    set_residual(model, 0.125)
    with pytest.raises(ValueError, match=r"^0: it trains with 0\.125 of its latent weight added.*set_residual"):
        convert(model)
    assert isinstance(model[0], SparseBitLinear)
    set_residual(model, 0)
    x, expected = torch.randn(4, 64), model.eval()
    assert torch.allclose(convert(copy.deepcopy(model))(x), expected(x), atol=1e-3)


def test_forward_products_leave_the_sparse_tensor_cores_while_it_lasts() -> None:
    model = network(Recipe("2:4"))
    dense = copy.deepcopy(model)
    x, steps = torch.randn(4, 64), StepWeights(model)
    steps.sparse_shapes = steps.shapes
    set_residual(dense, 0.5)
    set_residual(model, 0.5)
    for one, another in zip(gradients(model, x, steps), gradients(dense, x, StepWeights(dense)), strict=True):
        assert torch.equal(one, another)
    assert model[0].step_fragments is None
    set_residual(model, 0)
    steps.refresh()
    assert model[0].step_fragments is not None


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"residual=-0\.5 is negative"):
        set_residual(network(SHERRY), -0.5)
    with pytest.raises(ValueError, match="call prepare"):
        set_residual(nn.Linear(4, 4), 0.5)


def test_layers_share_one_number() -> None:
    model = network(Recipe(NMPattern(3, 4), values="sign"))
    set_residual(model, 0.5)
    set_residual(model, 0.25)
    assert {float(layer.residual) for layer in (model[0], model[2])} == {0.25}
    assert model[0].residual is model[2].residual
    assert "residual" not in " ".join(model.state_dict())


def test_a_share_given_as_an_integer_may_fall() -> None:
    model = network(SHERRY)
    for share in (1, 0.5):
        set_residual(model, share)
        assert float(model[0].residual) == share
