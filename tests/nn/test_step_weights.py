"""Effective weights made once an optimizer step: the same training, bit for bit, and never a stale weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparse_bitnet import Recipe, SparseBitLinear, prepare, set_pattern
from sparse_bitnet.kernels.effective_weight import OPERATOR
from sparse_bitnet.nn.step_weights import StepWeights

RECIPES = [Recipe("6:8"), Recipe("2:4", gradient="masked"), Recipe("3:4", values="sign"), Recipe("2:4", values="full")]


def network(recipe: Recipe) -> nn.Sequential:
    return prepare(nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 32)), recipe)


def train(model: nn.Module, run: nn.Module, step_weights: StepWeights | None) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(4):
        if step_weights is not None:
            step_weights.refresh()
        for _ in range(2):
            loss = run(torch.randn(8, 64, generator=generator)).square().mean()
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
@pytest.mark.parametrize("compiled", [False, True])
def test_training_is_the_same_bit_for_bit(recipe: Recipe, compiled: bool) -> None:
    model = network(recipe)
    other = copy.deepcopy(model)
    run = torch.compile(other, backend="aot_eager", fullgraph=True) if compiled else other
    assert train(model, model, None) == train(other, run, StepWeights(other))
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, another)


def test_micro_batches_of_a_step_share_what_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = network(Recipe("6:8")), []
    run = type(OPERATOR).run
    monkeypatch.setattr(type(OPERATOR), "run", lambda self, *args: (made.append(self.name), run(self, *args))[1])
    train(model, model, StepWeights(model))
    assert made.count("effective_weight") == 4  # one for all layers, each of the 4 steps
    made.clear()
    train(model, model, None)
    assert made.count("effective_weight") == 4 * 2 * 2


@pytest.fixture
def layer() -> SparseBitLinear:
    layer = SparseBitLinear(16, 8, recipe=Recipe("2:4"))
    StepWeights(layer).refresh()
    assert layer.step_weight is not None
    return layer


def assert_fresh(layer: SparseBitLinear, **context: object) -> None:
    x = torch.randn(3, 16)
    found = layer(x)
    layer.step_weight = None
    assert torch.equal(found, layer(x))


def test_a_weight_that_was_changed_is_read_anew(layer: SparseBitLinear) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)
    assert_fresh(layer)


@pytest.mark.parametrize("fused", [False, True])
def test_a_weight_that_an_optimizer_changed_is_read_anew(fused: bool) -> None:
    """A fused optimizer leaves the version of a weight as it was."""
    model, x = network(Recipe("6:8")), torch.randn(8, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    step_weights = StepWeights(model)
    step_weights.refresh()
    model(x).square().mean().backward()
    optimizer.step()
    assert torch.equal(model(x), copy.deepcopy(model).eval()(x))
    step_weights.refresh()
    assert torch.equal(model(x), copy.deepcopy(model).eval()(x))


def test_evaluation_reads_the_weight_anew(layer: SparseBitLinear) -> None:
    assert layer.step_weight is not None
    layer.step_weight.zero_()
    assert_fresh(layer.eval())


def test_arithmetic_in_another_dtype_reads_the_weight_anew(layer: SparseBitLinear) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_fresh(layer)


def test_another_pattern_is_seen_at_once_and_at_the_next_refresh() -> None:
    model = network(Recipe("8:8"))
    other, x = copy.deepcopy(model), torch.randn(3, 64)
    step_weights = StepWeights(model)
    step_weights.refresh()
    set_pattern(model, "2:4")
    set_pattern(other, "2:4")
    assert torch.equal(model(x), other(x))
    step_weights.refresh()
    first = model[0]
    assert isinstance(first, SparseBitLinear) and first.step_weight is not None
    assert int((first.step_weight.view(48, 16, 4) != 0).sum(-1).max()) == 2


def test_released_layers_hold_nothing() -> None:
    model = network(Recipe("6:8"))
    step_weights = StepWeights(model)
    step_weights.refresh()
    step_weights.release()
    assert all(layer.step_weight is None for layer in model if isinstance(layer, SparseBitLinear))
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_backward_pass_after_a_refresh_is_refused(is_sparse: bool) -> None:
    model = network(Recipe("6:8"))
    step_weights = StepWeights(model)
    step_weights.sparse_shapes = step_weights.shapes if is_sparse else ()
    step_weights.refresh()
    loss = model(torch.randn(8, 64)).square().mean()
    step_weights.refresh()
    with pytest.raises(RuntimeError, match=r"modified.*inplace"):
        loss.backward()


def test_a_weight_that_is_only_there_in_the_forward_pass_is_left_alone() -> None:
    model = network(Recipe("6:8"))
    first = model[0]
    assert isinstance(first, SparseBitLinear)
    first.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    StepWeights(model).refresh()
    assert first.step_weight is None


def test_a_weight_that_was_exchanged_is_read_anew() -> None:
    x, other = torch.randn(3, 16), SparseBitLinear(16, 8, recipe=Recipe("2:4"))
    for exchange in ("copy", "assign", "data"):
        layer = SparseBitLinear(16, 8, recipe=Recipe("2:4"))
        StepWeights(layer).refresh()
        if exchange == "copy":
            layer = copy.deepcopy(layer)
            layer.load_state_dict(other.state_dict())
        elif exchange == "assign":
            layer.load_state_dict(other.state_dict(), assign=True)
        else:
            layer.weight.data, layer.bias.data = other.weight.data, other.bias.data
        assert torch.equal(layer(x), other(x)), exchange


def test_layers_of_several_recipes_are_refused() -> None:
    model = prepare(nn.Sequential(nn.Sequential(nn.Linear(16, 8)), nn.Sequential(nn.Linear(8, 8))), Recipe("8:8"))
    set_pattern(model[1], "2:4")
    with pytest.raises(ValueError, match=r"8:8.* and .*2:4.*: give all one, see set_pattern"):
        StepWeights(model).refresh()
