"""An MLP whose gate is opened by the kernel that quantises computes what it did, and stops where it no longer may."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from sparse_bitnet import PackedLinear, Recipe, accelerate, convert, prepare
from sparse_bitnet.bench.checks import check_layers
from sparse_bitnet.nn import gated_mlp
from sparse_bitnet.nn.choosing import NEVER
from sparse_bitnet.nn.fast_weight import fast_weight
from sparse_bitnet.nn.gated_mlp import GatedMLP, computes_as_named, gated_products, open_gates, ways_of
from sparse_bitnet.nn.shared_inputs import join, layers_sharing_inputs, share
from sparse_bitnet.recipe import Activations

MANY = torch.arange(96).reshape(2, 48) % 32
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def language_model(
    pattern: str = "6:8", activation: str = "silu", activations: Activations = "int8"
) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, hidden_act=activation,
    )  # fmt: skip
    return convert(prepare(Qwen2ForCausalLM(config).eval(), Recipe(pattern, activations=activations)), "i2")


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


def gate(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Gates opened for any number of tokens."""
    with pytest.MonkeyPatch.context() as patch:
        times = dict(zip(gated_mlp.WAYS, (1.0, 2.0), strict=True))
        patch.setattr(gated_mlp, "microseconds_of_a_layer", lambda *_: times)
        (choice,) = open_gates(model, (1, 64), dtype)
    assert choice.taken_from == 1
    return model


def mlps(model: Qwen2ForCausalLM) -> list[nn.Module]:
    return [layer.mlp for layer in model.model.layers]


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
@torch.no_grad()
def test_it_computes_what_the_module_does(pattern: str) -> None:
    model = accelerated(language_model(pattern))
    expected, state = model(MANY).logits, {name: one.clone() for name, one in model.state_dict().items()}
    gate(model)
    assert all(isinstance(mlp, GatedMLP) and gated_products(mlp) for mlp in mlps(model))
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(model(MANY).logits, expected, **close)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())
    copied = copy.deepcopy(model)
    for mlp, other in zip(mlps(copied), mlps(model), strict=True):
        products, others = gated_products(mlp), gated_products(other)
        assert products and others and products[1] is mlp.down_proj.fast is not others[1]
    torch.testing.assert_close(copied(MANY).logits, expected, **close)


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("compiled_sparse_from", [NEVER, 1])
@torch.no_grad()
def test_compiled_it_is_one_operator_for_the_product_that_is_taken(compiled_sparse_from: int) -> None:
    model = gate(accelerated(language_model()))
    mlp, graphs = model.model.layers[0].mlp, []
    mlp.down_proj.fast = replace(mlp.down_proj.fast, compiled_sparse_from=compiled_sparse_from)
    torch.compiler.reset()

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(mlp, backend=keep, fullgraph=True, dynamic=False)
    for shape in ((65, 64), (2, 2, 64), (0, 64)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), mlp(x), rtol=1e-3, atol=1e-3)
    assert not any("silu" in code for code in graphs)
    assert ["quantize_gated_planes" in code for code in graphs[:2]] == [False, compiled_sparse_from == NEVER]


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("pattern", ["6:8", "7:8"])
@torch.no_grad()
def test_few_compiled_tokens_need_no_sparse_tensor_cores(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = accelerated(language_model(pattern)), []
    monkeypatch.setattr(gated_mlp, "microseconds_of_a_layer", lambda ways, *_: dict(zip(ways, (2.0, 1.0), strict=True)))
    choices = open_gates(model, (1,), torch.float32)
    assert [choice.taken_from for choice in choices] == [NEVER] * (pattern == "6:8")
    mlp, x = mlps(model)[0], torch.randn(4, 64)
    assert mlp.down_proj.fast.fragments is None
    torch.compiler.reset()
    compiled = torch.compile(mlp, backend=lambda graph, _: graphs.append(graph.code) or graph.forward, dynamic=False)
    torch.testing.assert_close(compiled(x), mlp(x), rtol=1e-3, atol=1e-3)
    assert "quantize_gated_planes" in graphs[0]


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
@torch.no_grad()
def test_what_was_loaded_anew_is_computed_with(name: str) -> None:
    model, other = gate(accelerated(language_model())), language_model()
    mlp = model.model.layers[0].mlp
    layer, loaded = getattr(mlp, name), getattr(other.model.layers[1].mlp, name)
    layer.load_state_dict(loaded.state_dict())
    setattr(other.model.layers[0].mlp, name, loaded)
    assert gated_products(mlp) is None
    torch.testing.assert_close(model(MANY).logits, other(MANY).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("on_a_cpu")
def test_a_model_that_was_moved_or_taken_apart_computes_by_its_layers() -> None:
    model, plain = gate(accelerated(language_model())), language_model()
    with torch.no_grad():
        expected = plain(MANY).logits
        model.double()
        assert gated_products(model.model.layers[0].mlp) is None
        torch.testing.assert_close(model(MANY).logits.float(), expected, rtol=1e-3, atol=1e-3)
        gate(accelerated(model.float()))  # and may be accelerated again
        mlp = model.model.layers[0].mlp
        assert gated_products(mlp) and isinstance(mlp.down_proj, PackedLinear)
        seen = []
        hook = mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
        model(MANY)
        hook.remove()
        assert seen == [1] and gated_products(mlp)
        mlp.act_fn = nn.ReLU()
        assert gated_products(mlp) is None
        mlp.act_fn = nn.SiLU()
        mlp.down_proj = mlp.down_proj.to_linear(torch.float32)
        assert gated_products(mlp) is None and model(MANY).logits.isfinite().all()
    x = torch.randn(100, 64, requires_grad=True)
    model.model.layers[1].mlp(x).sum().backward()
    assert x.grad is not None and bool(x.grad.any())


@pytest.mark.usefixtures("on_a_cpu")
@torch.no_grad()
def test_only_an_mlp_whose_forward_is_that_and_whose_down_can_be_sparse() -> None:
    class Clamped(Qwen2MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7) * self.up_proj(x))

    class Said(Qwen2MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    class Scaled(Said):
        def forward(self, x: torch.Tensor, scale: float = 2) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    class Wrapped(Said):
        forward = functools.wraps(Said.forward)(lambda self, x: 2 * Said.forward(self, x))

    mlp = accelerated(language_model()).model.layers[0].mlp
    assert computes_as_named(mlp)
    for kind, is_that in ((Clamped, False), (Said, True), (Scaled, False), (Wrapped, False)):
        mlp.__class__ = kind
        assert computes_as_named(mlp) is is_that
    mlp.__class__ = Said
    hook = mlp.register_forward_hook(lambda *_: None)
    assert not computes_as_named(mlp)
    hook.remove()
    other = accelerated(language_model())
    for layer in other.model.layers:
        layer.mlp.up_proj.fast = layer.mlp.gate_proj.fast.alone  # as where gate and up could not be joined
    int4 = accelerated(language_model(activations="int4"))
    for model in (language_model(), accelerated(language_model(activation="gelu")), other, int4):
        assert not open_gates(model, (1,), torch.float32)
        assert not any(isinstance(mlp, GatedMLP) for mlp in mlps(model))


@pytest.mark.usefixtures("on_a_cpu")
@torch.no_grad()
def test_it_is_taken_only_where_it_is_the_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerated(language_model())
    monkeypatch.setattr(gated_mlp, "microseconds_of_a_layer", lambda ways, *_: dict(zip(ways, (2.0, 1.0), strict=True)))
    (choice,) = open_gates(model, (2, 64), torch.float32)
    assert str(choice).splitlines()[::2] == [
        "2 gates before 64 x 96, 6:8",
        "      64 tokens: one kernel 2.0, apart 1.0 us: apart",
    ]
    assert all(mlp.down_proj.fast.fragments is None for mlp in mlps(model))
    gate(model)
    before = mlps(model)
    open_gates(model, (2, 64), torch.float32)
    assert [mlp.from_tokens for mlp in mlps(model)] == [NEVER, NEVER]
    assert mlps(model) == before and before[0].config is model.config  # what is hooked to them stays


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("kernel", ["quantize_gated", "quantize_gated_planes"])
@torch.no_grad()
def test_no_speed_is_told_of_a_gate_that_is_wrong(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gate(accelerated(language_model()))
    check_layers(model, (3,), torch.float32)
    right = getattr(gated_mlp, kernel)
    monkeypatch.setattr(gated_mlp, kernel, lambda gate_and_up, *rest: right(gate_and_up.flip(-1), *rest))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp with 3 tokens is not its layers"):
        check_layers(model, (3,), torch.float32)


@torch.no_grad()
def test_both_ways_are_the_same() -> None:
    down = accelerated(language_model()).model.layers[0].mlp.down_proj
    one, apart = (way(fast_weight(down, True)) for way in ways_of(torch.randn(5, 192)).values())
    torch.testing.assert_close(one, apart)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("pattern", [pytest.param(pattern, marks=gpu) for pattern in ("2:4", "6:8")])
@torch.no_grad()
def test_on_a_gpu(pattern: str) -> None:
    model = language_model(pattern).cuda().to(torch.bfloat16)
    expected = {tokens: model(tokens).logits for tokens in (MANY.cuda(), MANY[:1].cuda())}
    assert accelerate(model, (1, 64))[-1].ways == gated_mlp.WAYS
    gate(model, torch.bfloat16)  # whatever was chosen
    assert all(gated_products(mlp) for mlp in mlps(model))
    for run in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        for tokens, wanted in expected.items():
            assert (run(tokens).logits - wanted).abs().max() < 0.05 * wanted.abs().max()
