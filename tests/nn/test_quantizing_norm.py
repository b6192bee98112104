"""A norm that quantises for the layers after it changes nothing of what a model computes, whatever they read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sparse_bitnet import Recipe, convert, prepare
from sparse_bitnet.bench.checks import check_layers
from sparse_bitnet.nn import quantizing_norm
from sparse_bitnet.nn.choosing import NEVER
from sparse_bitnet.nn.fast_weight import fast_weight
from sparse_bitnet.nn.quantizing_norm import QuantizingNorm, is_rms_norm, quantize_in_norms
from sparse_bitnet.nn.shared_inputs import join, layers_sharing_inputs, share
from sparse_bitnet.recipe import Activations

MANY = torch.arange(96).reshape(2, 48) % 32
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def language_model(
    kind: type[PreTrainedModel] = Qwen2ForCausalLM, config: type[PretrainedConfig] = Qwen2Config, pattern: str = "6:8",
    activations: Activations = "int8",
) -> PreTrainedModel:  # fmt: skip
    torch.manual_seed(0)
    settings = config(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = kind(settings).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.normal_(parameter, 1, 0.1)
    return convert(prepare(model, Recipe(pattern, activations=activations)), "i2")


def accelerated(model: PreTrainedModel, sparse_from: int = 1, compiled_sparse_from: int = NEVER) -> PreTrainedModel:
    """As `accelerate` may choose on a GPU; the reference of the sparse product stands in for sparse tensor cores."""
    for group in layers_sharing_inputs(model):
        weight = fast_weight(join(group), has_fragments=True)
        weight = replace(weight, sparse_from=sparse_from, compiled_sparse_from=compiled_sparse_from)
        share(weight, group, weight.by_part())
    quantize_in_norms(model)
    return model


def compiled(model: nn.Module, graphs: list[str]) -> Callable[..., torch.Tensor]:
    """What torch.compile hands on is kept in `graphs`, without what nobody reads."""
    torch.compiler.reset()

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graph.graph.eliminate_dead_code()
        graph.recompile()
        graphs.append(graph.code)
        return graph.forward

    return torch.compile(model, backend=keep, fullgraph=True, dynamic=False)


def norms(model: nn.Module) -> list[QuantizingNorm]:
    return [module for module in model.modules() if isinstance(module, QuantizingNorm)]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (LlamaForCausalLM, LlamaConfig), (MistralForCausalLM, MistralConfig), (Qwen2ForCausalLM, Qwen2Config),
        (Qwen3ForCausalLM, Qwen3Config),
    ],
    ids=lambda one: one.__name__,
)  # fmt: skip
@torch.no_grad()
def test_a_model_computes_the_same_and_the_compiler_leaves_out_what_the_norm_gives(
    kind: type[PreTrainedModel], config: type[PretrainedConfig]
) -> None:
    plain, model, graphs = language_model(kind, config), accelerated(language_model(kind, config)), []
    expected, state = plain(MANY).logits, plain.state_dict()
    assert len(norms(model)) == 4
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())
    assert state.keys() == model.state_dict().keys()
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(model(MANY).logits, expected, **close)
    run = compiled(model, graphs)
    torch.testing.assert_close(run(MANY, use_cache=False).logits, expected, **close)
    (code,) = graphs
    assert code.count("torch.rsqrt(") == (5 if config is Qwen3Config else 1)  # of queries and keys too
    assert all(norm.joint().ahead is None for norm in norms(model))
    assert code.count("sparse_product") >= 4


@torch.no_grad()
def test_few_tokens_and_packed_products_take_the_norm_apart() -> None:
    for tokens, sparse_from in ((MANY[:1], 1), (MANY, NEVER)):
        model, graphs = accelerated(language_model(), sparse_from), []
        compiled(model, graphs)(tokens, use_cache=False)
        assert graphs[0].count("torch.rsqrt(") == 5


@torch.no_grad()
@pytest.mark.parametrize(("pattern", "apart"), [("2:4", True), ("6:8", False)])
def test_few_tokens_that_need_a_lift_are_quantised_with_their_norm(pattern: str, apart: bool) -> None:
    expected = language_model(pattern=pattern)(MANY[:1]).logits
    model, graphs = accelerated(language_model(pattern=pattern), compiled_sparse_from=1), []
    found = compiled(model, graphs)(MANY[:1], use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert graphs[0].count("torch.rsqrt(") == (5 if apart else 1)
    assert graphs[0].count("sparse_product") >= 4


@torch.no_grad()
def test_layers_that_are_given_something_else_compute_with_that() -> None:
    model, graphs = accelerated(language_model()), []
    block = model.model.layers[0]
    norm, mlp = block.post_attention_layernorm, block.mlp

    def run(x: torch.Tensor) -> torch.Tensor:
        return mlp(norm(x) + 1)

    x = torch.randn(96, 64)
    torch.testing.assert_close(compiled(run, graphs)(x), run(x))  # type: ignore[arg-type]


@torch.no_grad()
def test_a_copy_and_a_model_taken_apart_do_nothing_ahead() -> None:
    model, graphs = accelerated(language_model()), []
    copied, block = copy.deepcopy(model), model.model.layers[0]
    assert [norm.joint() for norm in norms(copied)] == [None] * 4
    torch.testing.assert_close(copied(MANY).logits, model(MANY).logits)
    assert len(list(copy.deepcopy(norms(model)[0]).modules())) == 1
    joints = [norm.joint() for norm in norms(model)]
    block.self_attn.q_proj = block.self_attn.q_proj.to_linear(torch.float32)
    block.mlp.gate_proj = block.mlp.gate_proj.to_linear(torch.float32)
    run = compiled(model, graphs)
    torch.testing.assert_close(run(MANY, use_cache=False).logits, model(MANY).logits, rtol=1e-3, atol=1e-3)
    assert [joint.ahead for joint in joints] == [None] * 4
    block.mlp = nn.Identity()  # whose layers have no names that anybody looks for
    assert model(MANY).logits.isfinite().all() and norms(model)[1].joint() is None


@torch.no_grad()
def test_int4_activations_are_quantised_apart() -> None:
    model, graphs = accelerated(language_model(activations="int4")), []
    compiled(model, graphs)(MANY, use_cache=False)
    assert "norm_weight" not in graphs[0] and "'int4'" in graphs[0]


@torch.no_grad()
def test_hooks_stay() -> None:
    model, seen = accelerated(language_model()), []
    before = norms(model)
    before[0].register_forward_hook(lambda *_: seen.append(1))
    quantize_in_norms(model)
    assert norms(model) == before
    compiled(model, [])(MANY, use_cache=False)
    assert seen


@torch.no_grad()
def test_a_model_that_was_moved_or_loaded_anew_does_nothing_ahead() -> None:
    model, graphs = accelerated(language_model()), []
    model.double()
    assert [norm.joint() for norm in norms(model)] == [None] * 4
    compiled(model, graphs)(MANY, use_cache=False)
    assert "sparse_product" not in graphs[0]
    accelerated(model.float())  # and may be accelerated again
    assert all(norm.joint() for norm in norms(model))


@pytest.mark.parametrize("of", ["activations", "weight"])
def test_where_a_gradient_is_needed_nothing_is_done_ahead(of: str) -> None:
    model, graphs = accelerated(language_model()), []
    model.requires_grad_(of == "weight")
    embedded = torch.randn(2, 48, 64, requires_grad=of == "activations")
    compiled(model, graphs)(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    found = embedded.grad if of == "activations" else norms(model)[0].weight.grad
    assert found is not None and bool(found.any())
    assert "norm_weight" not in graphs[0]


@torch.no_grad()
def test_only_norms_that_are_known_by_name_and_compute_that() -> None:
    assert not norms(accelerated(language_model(Gemma2ForCausalLM, Gemma2Config)))
    norm = language_model().model.layers[0].input_layernorm
    assert is_rms_norm(norm)
    hook = norm.register_forward_hook(lambda *_: None)
    assert not is_rms_norm(norm)
    hook.remove()
    norm.forward = lambda x: 2 * x
    assert not is_rms_norm(norm) and not is_rms_norm(nn.RMSNorm(64)) and not is_rms_norm(None)


@torch.no_grad()
def test_no_speed_is_told_of_a_norm_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerated(language_model())
    check_layers(model, (3,), torch.float32)
    right = quantizing_norm.quantize_normed
    monkeypatch.setattr(quantizing_norm, "quantize_normed", lambda x, *rest: right(x.flip(-1), *rest))
    with pytest.raises(ValueError, match=r"layers\.0\.input_layernorm with 3 tokens is not its layers"):
        check_layers(model, (3,), torch.float32)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("pattern", [pytest.param(pattern, marks=gpu) for pattern in ("2:4", "6:8")])
@torch.no_grad()
def test_on_a_gpu(pattern: str) -> None:
    model = language_model(pattern=pattern).cuda().to(torch.bfloat16)
    expected = model(MANY.cuda()).logits
    accelerated(model, compiled_sparse_from=1)
    assert len(norms(model)) == 4
    run = torch.compile(model, fullgraph=True, dynamic=False)
    for many in (2, 1):  # of 48 tokens each, and 64 are few
        logits = run(MANY[:many].cuda(), use_cache=False).logits
        assert (logits - expected[:many]).abs().max() < 0.05 * expected.abs().max()
