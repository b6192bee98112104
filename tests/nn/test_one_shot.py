"""Activation-aware starting masks: norms as counted by hand, and the mask that the scores ask for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sparse_bitnet import Recipe, SparseBitLinear, prepare
from sparse_bitnet.nn.layer import LatentLayer
from sparse_bitnet.nn.one_shot import dense_scales, input_norms, restore_scales, start_from_norms
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.nn.swap import set_recipe
from sparse_bitnet.numerics.nm_mask import nm_mask
from sparse_bitnet.recipe import NMPattern

AS_IT_IS = Recipe("8:8", values="full", activations="none")
Make = Callable[..., PreTrainedModel]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.silu(self.first(x)))


def test_norms_are_those_of_all_inputs_of_a_layer() -> None:
    model = Network()
    batches = [torch.randn(3, 5, 32), torch.randn(2, 32)]
    hidden = torch.cat([F.silu(model.first(x)).flatten(0, -2) for x in batches])
    norms = input_norms(prepare(model, AS_IT_IS), [{"x": x} for x in batches])
    torch.testing.assert_close(norms["first"], torch.cat([x.flatten(0, -2) for x in batches]).norm(dim=0))
    torch.testing.assert_close(norms["second"], hidden.norm(dim=0).detach())
    assert not model.first._forward_pre_hooks


def test_experts_have_norms_of_the_tokens_that_came_to_them(mixture_model: Make) -> None:
    model = prepare(mixture_model(num_hidden_layers=1), AS_IT_IS)
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[3] = -1e3 * model.model.layers[0].mlp.gate.weight[:3].sum(0)
    seen: list[tuple[torch.Tensor, ...]] = []
    hook = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    norms = input_norms(model, [{"input_ids": torch.arange(20).view(1, 20)}])
    hook.remove()
    x, index, _ = seen[0]
    for expert in range(4):
        rows = x[(index == expert).any(dim=1)]
        gate, up = F.linear(rows, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        expected = rows.norm(dim=0), (F.silu(gate) * up).norm(dim=0)
        for name, wanted in zip(("gate_up_proj", "down_proj"), expected, strict=True):
            found = norms[f"model.layers.0.mlp.experts.{name}"][expert]
            torch.testing.assert_close(found, wanted.detach() if len(rows) else torch.ones_like(found))


@pytest.mark.parametrize("mixture", [False, True])
def test_the_first_mask_is_the_one_that_the_scores_ask_for(
    dense_model: Make, mixture_model: Make, mixture: bool
) -> None:
    model, pattern = prepare((mixture_model if mixture else dense_model)(), AS_IT_IS), NMPattern(2, 4)
    latent = {name: layer for name, layer in named_layers(model) if isinstance(layer, LatentLayer)}
    norms = input_norms(model, [{"input_ids": torch.randint(0, 320, (2, 40))}])
    scores = {name: layer.weight.detach().abs() * norms[name].unsqueeze(-2) for name, layer in latent.items()}
    scales, changed = dense_scales(model), 0
    start_from_norms(model, norms, pattern)
    set_recipe(model, Recipe("2:4"))
    restore_scales(model, scales)
    for name, layer in latent.items():
        mask = nm_mask(scores[name], pattern)
        assert torch.equal(nm_mask(layer.weight, pattern), mask)
        codes, scale = layer.quantize_weight()
        assert not bool((codes != 0)[~mask].any())
        torch.testing.assert_close(scale, scales[name], rtol=1e-6, atol=0)
        changed += int((mask != nm_mask(scores[name] / norms[name].unsqueeze(-2), pattern)).sum())
    assert changed > 0


def test_pruned_weights_learn_and_can_return() -> None:
    layer = SparseBitLinear(4, 1, bias=False, recipe=Recipe("2:4", values="full", activations="none"))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    start_from_norms(nn.ModuleDict({"one": layer}), {"one": torch.tensor([1.0, 0.1, 1.0, 1.0])}, NMPattern(2, 4))
    assert layer.weight.tolist() == [[4.0, 1.0, 2.0, 1.0]]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(6):
        (layer(torch.tensor([[0.0, 1.0, 0.0, 0.0]])).sum() - 3).square().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bool(layer.weight[0, 1] > 2)


def test_a_layer_that_was_never_called_is_refused() -> None:
    model = prepare(Network(), AS_IT_IS)
    with pytest.raises(ValueError, match="second had no input in the calibration text"):
        start_from_norms(model, {"first": torch.ones(32)}, NMPattern(6, 8))
