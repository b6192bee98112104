"""An MLP whose gate is opened by the kernel that quantises computes what it did, and stops where it no longer may."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from sparse_bitnet import Recipe, accelerate, convert, prepare
from sparse_bitnet.nn import gated_mlp
from sparse_bitnet.nn.fast_weight import FastWeight, fast_weight
from sparse_bitnet.nn.gated_mlp import GateChoice, GatedMLP, fuse_gates, gated_mlps
from sparse_bitnet.nn.shared_inputs import join, layers_sharing_inputs, share

TOKENS = torch.arange(14).reshape(2, 7)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def language_model(pattern: str = "6:8", activation: str = "silu") -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, hidden_act=activation,
    )  # fmt: skip
    return convert(prepare(Qwen2ForCausalLM(config).eval(), Recipe(pattern)), "i2")


def accelerated(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """Packed products everywhere, as `accelerate` on a GPU may choose."""
    for group in layers_sharing_inputs(model):
        weight = fast_weight(join(group), has_fragments=False)
        share(weight, group, weight.by_part())
    for layer in model.model.layers:
        layer.mlp.down_proj.fast = fast_weight(layer.mlp.down_proj, has_fragments=False)
    return model


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of the sparse product stands in for sparse tensor cores."""
    monkeypatch.setattr(gated_mlp, "sparse_tensor_core_obstacle", lambda device, dtype: None)


def gate(model: nn.Module, from_tokens: int = 0) -> list[GatedMLP]:
    found = list(gated_mlps(model, torch.float32))
    for one in found:
        one.from_tokens = from_tokens
        one.module.down_proj.fast = one.down
        one.module.forward = one
    return found


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
@torch.no_grad()
def test_it_computes_what_the_module_does(pattern: str) -> None:
    model = accelerated(language_model(pattern))
    expected, keys = model(TOKENS).logits, list(model.state_dict())
    assert len(gate(model)) == 2
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(model(TOKENS).logits, expected, **close)
    assert list(model.state_dict()) == keys
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(TOKENS).logits, expected, **close)
    torch.testing.assert_close(copy.deepcopy(model)(TOKENS).logits, expected, **close)


@pytest.mark.usefixtures("on_a_cpu")
def test_few_tokens_gradients_and_layers_made_anew_take_the_forward_of_the_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, finished = accelerated(language_model()), []
    one, other = gate(model, from_tokens=14)
    monkeypatch.setattr(GatedMLP, "finish", lambda self, y: finished.append(self) or y[..., :64])

    def gated(tokens: torch.Tensor) -> list[GatedMLP]:
        finished.clear()
        with torch.no_grad():
            model(tokens)
        return list(finished)

    assert [id(found) for found in gated(TOKENS)] == [id(one), id(other)]
    assert not gated(TOKENS[:1])
    model(TOKENS).logits.sum().backward()
    assert not finished
    one.module.down_proj.load_state_dict(one.module.down_proj.state_dict())
    assert [id(found) for found in gated(TOKENS)] == [id(other)]
    model.to(torch.bfloat16)
    assert not gated(TOKENS)


@pytest.mark.usefixtures("on_a_cpu")
@torch.no_grad()
def test_only_where_the_module_computes_by_its_names_and_down_can_be_sparse() -> None:
    assert not list(gated_mlps(language_model(), torch.float32))  # not accelerated
    assert not list(gated_mlps(accelerated(language_model(activation="gelu")), torch.float32))
    assert not list(gated_mlps(accelerated(language_model("7:8")), torch.float32))
    model = accelerated(language_model())
    gate(model)
    assert not list(gated_mlps(model, torch.float32))  # done already


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("is_faster", [True, False])
@torch.no_grad()
def test_it_is_taken_from_where_it_is_the_faster(is_faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(ways: dict[str, object], *_: object) -> dict[str, float]:
        return {way: float(index == is_faster) for index, way in enumerate(ways)}

    monkeypatch.setattr(gated_mlp, "microseconds_of_a_layer", times)
    model = accelerated(language_model())
    expected = model(TOKENS).logits
    (choice,) = fuse_gates(model, (2, 64), torch.float32)
    mlp = model.model.layers[0].mlp
    assert ("forward" in vars(mlp)) == is_faster
    assert isinstance(mlp.down_proj.fast, FastWeight)
    assert (mlp.down_proj.fast.fragments is not None) == is_faster
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-3, atol=1e-3)
    assert str(choice).splitlines()[0] == "2 gates before 64 x 96, 6:8"


def test_what_was_chosen_is_told() -> None:
    times = {16: {"one kernel": 9.0, "apart": 8.0}, 64: {"one kernel": 9.0, "apart": 12.0}}
    assert str(GateChoice((64, 96), Recipe("2:4"), 3, times)).splitlines() == [
        "3 gates before 64 x 96, 2:4",
        "      16 tokens: one kernel 9.0, apart 8.0 us: apart",
        "      64 tokens: one kernel 9.0, apart 12.0 us: one kernel",
    ]


@pytest.mark.parametrize("pattern", [pytest.param(pattern, marks=gpu) for pattern in ("2:4", "6:8")])
@torch.no_grad()
def test_on_a_gpu(pattern: str) -> None:
    model = language_model(pattern).cuda().to(torch.bfloat16)
    tokens = TOKENS.cuda()
    expected = model(tokens).logits
    choices = accelerate(model, (1, 64))
    assert isinstance(choices[-1], GateChoice)
    for layer in model.model.layers:  # whatever was chosen
        vars(layer.mlp).pop("forward", None)
    assert len(gate(model)) == 2
    for run in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        logits = run(tokens).logits
        assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
