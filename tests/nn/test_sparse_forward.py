"""Forward products on sparse tensor cores: losses and gradients of the dense ones, chosen only where they can be."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from sparse_bitnet import Recipe, SparseBitLinear, prepare, set_pattern
from sparse_bitnet.nn.sparse_forward import (
    sparse_forward_gains,
    sparse_forward_obstacle,
    sparse_tensor_core_obstacle,
)
from sparse_bitnet.nn.step_weights import StepWeights

RECIPES = [
    Recipe("2:4"),
    Recipe("6:8", gradient="masked"),
    Recipe("6:8", activations="int4"),
    Recipe("4:6"),
    Recipe("2:4", values="sign"),
]
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    """Each test compiles the layer for another recipe, and torch.compile has a limit for that."""
    yield
    torch.compiler.reset()


def network(recipe: Recipe) -> nn.Sequential:
    return prepare(nn.Sequential(nn.Linear(192, 96), nn.SiLU(), nn.Linear(96, 32, bias=False)), recipe)


def loss_and_gradients(model: nn.Module, run: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    loss = run(x).float().square().mean()
    model.zero_grad()
    loss.backward()
    return [loss.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]  # type: ignore


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
@pytest.mark.parametrize("has_parts", [False, True])
def test_losses_and_gradients_are_those_of_dense_products(recipe: Recipe, has_parts: bool) -> None:
    model = network(recipe)
    if has_parts:
        first = model[0]
        assert isinstance(first, SparseBitLinear)
        first.parts = (32, 64)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    dense, sparse = StepWeights(model), StepWeights(other)
    sparse.sparse_shapes = sparse.shapes
    dense.refresh()
    sparse.refresh()
    assert all(layer.step_fragments is not None for layer in other if isinstance(layer, SparseBitLinear))
    x = torch.randn(2, 5, 192)
    expected = loss_and_gradients(model, model, x)
    for run in (other, compiled):
        for found, wanted in zip(loss_and_gradients(other, run, x), expected, strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("width", [192, 6144])
def test_a_token_too_wide_to_fuse_has_the_same_gradients_when_compiled(width: int) -> None:
    layer = SparseBitLinear(width, 16, recipe=Recipe("6:8"))
    step_weights = StepWeights(layer, sparse_shapes={(16, width)})
    step_weights.refresh()
    x = torch.randn(3, width)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(loss_and_gradients(layer, compiled, x), loss_and_gradients(layer, layer, x), strict=True):
        torch.testing.assert_close(found, wanted)


def test_another_pattern_is_arranged_anew_and_one_without_a_sparse_form_is_dense() -> None:
    model = network(Recipe("6:8"))
    other, x = copy.deepcopy(model), torch.randn(3, 192)
    step_weights = StepWeights(model)
    step_weights.sparse_shapes = step_weights.shapes
    first = model[0]
    assert isinstance(first, SparseBitLinear)
    for pattern, has_form in (("6:8", True), ("2:4", True), ("8:8", False), ("6:8", True)):
        set_pattern(model, pattern)
        set_pattern(other, pattern)
        torch.testing.assert_close(model(x), other(x))  # what was made for the pattern before is not used
        step_weights.refresh()
        assert (first.step_fragments is not None) is has_form
        torch.testing.assert_close(model(x), other(x))
    step_weights.release()
    assert first.step_fragments is None and first.step_row_scale is None


def test_why_a_layer_has_no_sparse_form() -> None:
    cases = {
        "one of floats": (Recipe("2:4", values="full"), (16, 64)),
        "needs ternary or sign": (Recipe("2:4", activations="none"), (16, 64)),
        "keeps more than m - 2": (Recipe("7:8"), (16, 64)),
        "m must be even": (Recipe("2:5"), (16, 80)),
        "12 rows of 64 lifted columns": (Recipe("2:4"), (12, 64)),
        "16 rows of 36 lifted columns": (Recipe("6:8"), (16, 24)),
    }
    for reason, (recipe, shape) in cases.items():
        assert reason in str(sparse_forward_obstacle(recipe, shape))
    assert sparse_forward_obstacle(Recipe("6:8"), (16, 64)) is None


def test_gains_are_measured_for_the_shapes_that_have_a_sparse_form() -> None:
    gains = sparse_forward_gains([(16, 64), (12, 64)], Recipe("2:4"), 8, torch.float32, torch.device("cpu"), 2)
    assert list(gains) == [(16, 64)]
    assert gains[16, 64] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_sparse_tensor_cores_says_so() -> None:
    obstacle = sparse_tensor_core_obstacle(torch.device("cpu"), torch.bfloat16)
    assert obstacle is not None and ("cuda" in obstacle or "GPU" in obstacle)


def test_nothing_is_chosen_where_a_backend_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_BITNET_BACKEND", "gpu_triton")
    obstacle = sparse_tensor_core_obstacle(torch.device("cpu"), torch.bfloat16)
    assert obstacle == "SPARSE_BITNET_BACKEND asks for a certain kernel"


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
def test_training_in_bf16_follows_the_dense_products(pattern: str, compiled: bool, device: str) -> None:
    """The sparse sums are exact, the dense ones rounded: the losses of 20 steps agree to the noise of bf16."""
    losses = []
    for is_sparse in (False, True):
        torch.manual_seed(0)
        model = prepare(nn.Sequential(nn.Linear(512, 8192), nn.SiLU(), nn.Linear(8192, 64)), Recipe(pattern)).to(device)
        step_weights = StepWeights(model, torch.bfloat16)
        step_weights.sparse_shapes = step_weights.shapes if is_sparse else ()
        run = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        x, target = torch.randn(300, 512, device=device), torch.randn(300, 64, device=device)
        found = []
        for _ in range(20):
            step_weights.refresh()
            with torch.autocast(device, torch.bfloat16):
                loss = nn.functional.mse_loss(run(x).float(), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        losses.append(found)
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1][0] == pytest.approx(losses[0][0], rel=2e-3)
    assert losses[1] != losses[0]


def test_one_token_without_leading_dimensions_has_gradients() -> None:
    layer = SparseBitLinear(64, 16, recipe=Recipe("2:4"))
    StepWeights(layer, sparse_shapes={(16, 64)}).refresh()
    layer(torch.randn(64)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.shape == (16, 64)
