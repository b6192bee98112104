"""The experts of a mixture in one tensor, compared with one `SparseBitLinear` for each matrix of each expert.

Shapes: T tokens, K experts a token, E experts, H hidden, F width of an expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    JetMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from sparse_bitnet import Recipe, SparseBitLinear, StepWeights, convert, prepare, set_pattern, summary
from sparse_bitnet.nn.experts import PackedExperts, SparseBitExperts, grouped_linear
from sparse_bitnet.nn.layer import LatentLayer, PackedLayer
from sparse_bitnet.nn.loading import unpack_to_linear
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.nn.swap import set_residual
from sparse_bitnet.training.monitors import MaskMonitor

Make = Callable[..., PreTrainedModel]
IDS = torch.arange(40).view(2, 20)
TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**TINY, num_local_experts=4),
    "olmoe": lambda: OlmoeConfig(**TINY, num_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **TINY, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=64
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **TINY, n_routed_experts=4, moe_intermediate_size=32, n_group=1, topk_group=1, first_k_dense_replace=1,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    ),
}  # fmt: skip
UNKNOWN: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "gpt_oss": (lambda: GptOssConfig(**TINY, num_local_experts=4, head_dim=16), "GptOssExperts has has_bias=True"),
    "llama4": (
        lambda: Llama4TextConfig(**TINY, num_local_experts=4, head_dim=16, intermediate_size_mlp=64),
        "Llama4TextExperts does not say how it is called",
    ),
    "jetmoe": (lambda: JetMoeConfig(**TINY, num_local_experts=4, kv_channels=16), "JetMoeParallelExperts holds weight"),
}
RECIPES = [
    Recipe("6:8"),
    Recipe("2:4", activations="none", gradient="masked"),
    Recipe("3:4", values="sign", activations="int4"),
    Recipe("4:8", values="full"),
]


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def experts_of(model: PreTrainedModel) -> SparseBitExperts:
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, SparseBitExperts)
    return experts


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H], two experts for each token, none for expert 2, and their shares."""
    x = torch.randn(11, 64, requires_grad=True)
    index = torch.tensor([[0, 1], [3, 0], [1, 3]])[torch.randint(0, 3, (11,))]
    return x, index, torch.rand(11, 2)


def expert_by_expert(
    experts: SparseBitExperts, recipe: Recipe, x: torch.Tensor, index: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, list[list[SparseBitLinear]]]:
    """The same by one layer for each matrix, token by token."""

    def layer(weight: torch.Tensor) -> SparseBitLinear:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.detach().clone())
        return SparseBitLinear.from_linear(linear, recipe)

    gates, ups = experts.gate_up_proj.chunk(2, dim=1)
    layers = [[layer(weight) for weight in three] for three in zip(gates, ups, experts.down_proj, strict=True)]
    rows = []
    for token, chosen in enumerate(index.tolist()):
        row = torch.zeros(64)
        for place, expert in enumerate(chosen):
            gate, up, down = layers[expert]
            row = row + share[token, place] * down(F.silu(gate(x[token])) * up(x[token]))
        rows.append(row)
    return torch.stack(rows), layers


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
def test_forward_and_backward_are_those_of_separate_layers(mixture_model: Make, recipe: Recipe) -> None:
    experts = experts_of(prepare(mixture_model(), recipe))
    x, index, share = routed()
    y = experts(x, index, share)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    to_x, x.grad = x.grad, None
    expected, layers = expert_by_expert(experts, recipe, x, index, share)
    expected.backward(upstream)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(to_x, x.grad, rtol=1e-4, atol=1e-6)
    for expert, (gate, up, down) in enumerate(layers):
        for found, parts in (
            (experts.gate_up_proj.grad[expert], (gate, up)),
            (experts.down_proj.grad[expert], (down,)),
        ):
            wanted = torch.cat([torch.zeros_like(one.weight) if expert == 2 else one.weight.grad for one in parts])
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_every_expert_and_of_gate_and_up_each_has_the_mean_of_its_own_rows(mixture_model: Make) -> None:
    experts = experts_of(prepare(mixture_model(), Recipe("6:8")))
    with torch.no_grad():
        experts.gate_up_proj *= torch.arange(1.0, 9.0).repeat_interleave(32).view(4, 64, 1)
    scale = experts.layers["gate_up_proj"].quantize_weight()[1]
    assert scale.shape == (4, 2)
    for expert in range(4):
        gate, up = (rows.double().abs().mean().float() for rows in experts.gate_up_proj[expert].split(32))
        assert scale[expert].tolist() == [gate.item(), up.item()]
    assert experts.layers["down_proj"].quantize_weight()[1].shape == (4, 1)


def test_parameters_keep_their_names_and_the_router_stays(mixture_model: Make) -> None:
    model = mixture_model()
    parameters, router = dict(model.named_parameters()), type(model.model.layers[0].mlp.gate)
    prepare(model, Recipe("6:8"))
    assert {name: value is parameters[name] for name, value in model.named_parameters()} == dict.fromkeys(
        parameters, True
    )
    assert all(
        type(layer.mlp.gate) is router and type(layer.mlp.experts) is SparseBitExperts for layer in model.model.layers
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_compute_what_they_did_where_nothing_is_rounded(kind: str) -> None:
    model = model_of(FAMILIES[kind]())
    expected = model(IDS).logits
    prepare(model, Recipe("8:8", values="full", activations="none"))
    assert sum(isinstance(module, SparseBitExperts) for module in model.modules()) == (
        1 if kind == "deepseek_v3" else 2
    )
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_experts_held_otherwise_are_refused_with_the_remedy(kind: str) -> None:
    config, why = UNKNOWN[kind]
    model = model_of(config())
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"{why}.*to leave them as they are"):
        prepare(model, Recipe("6:8"))
    assert {name: type(module) for name, module in model.named_modules()} == before
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # of its own
    prepare(model, Recipe("6:8"), targets=["lm_head"], ignore=())


@pytest.mark.parametrize("entry", ["experts", "gate_up_proj", "*.experts.*", "experts.down_proj"])
def test_an_entry_means_all_weights_of_the_experts(mixture_model: Make, entry: str) -> None:
    chosen = {name for name, _ in named_layers(prepare(mixture_model(), Recipe("6:8"), targets=[entry]))}
    assert chosen == {f"model.layers.{i}.mlp.experts.{name}_proj" for i in range(2) for name in ("gate_up", "down")}
    left = prepare(mixture_model(), Recipe("6:8"), ignore=["lm_head", entry])
    assert not any("experts" in name for name, _ in named_layers(left))


def test_widths_that_m_does_not_divide_are_refused_or_left(mixture_model: Make) -> None:
    model = mixture_model(moe_intermediate_size=36)
    with pytest.raises(ValueError, match=r"in_features=36 is not a multiple of m=8 \(model.layers.0.mlp.experts"):
        prepare(model, Recipe("6:8"))
    assert not list(named_layers(model))
    with pytest.warns(UserWarning, match=r"model.layers.\d.mlp.experts is left as it is: in_features=36"):
        prepare(model, Recipe("6:8"), indivisible="skip")
    assert len(list(named_layers(model))) == 8


@pytest.mark.parametrize("recipe", [Recipe("6:8"), Recipe("2:4"), Recipe("3:4", values="sign")], ids=str)
def test_packs_the_codes_and_scales_of_the_latent_forward_pass(mixture_model: Make, recipe: Recipe) -> None:
    model = prepare(mixture_model(), recipe)
    latent = {name: layer.quantize_weight() for name, layer in named_layers(model) if isinstance(layer, LatentLayer)}
    before = model(IDS).logits.detach()
    convert(model)
    assert all(type(layer.mlp.experts) is PackedExperts for layer in model.model.layers)
    for name, layer in named_layers(model):
        assert isinstance(layer, PackedLayer)
        assert torch.equal(layer.codes(), latent[name][0])
        assert torch.equal(layer.weight_scale, latent[name][1].half().float())
    after = model(IDS).logits.detach()
    assert float((after - before).norm() / before.norm()) < 5e-3  # scales in fp16, and int8 steps they move
    model.to(torch.bfloat16)
    assert model.model.layers[0].mlp.experts.down_proj_scale.dtype == torch.float32


def test_unpacks_to_the_experts_of_the_model(mixture_model: Make) -> None:
    model = mixture_model()
    kind = type(model.model.layers[0].mlp.experts)
    convert(prepare(model, Recipe("6:8", activations="none")))
    packed = model(IDS).logits
    unpack_to_linear(model, torch.float32)
    assert not list(named_layers(model)) and type(model.model.layers[0].mlp.experts) is kind
    torch.testing.assert_close(model(IDS).logits, packed, rtol=1e-3, atol=1e-5)


def test_no_tokens_and_one_token(mixture_model: Make) -> None:
    experts = experts_of(prepare(mixture_model(), Recipe("6:8")))
    packed = PackedExperts.from_latent(experts)
    for count in (0, 1):
        arguments = torch.randn(count, 64), torch.tensor([[3, 1]])[:count], torch.rand(count, 2)
        assert experts(*arguments).shape == packed(*arguments).shape == (count, 64)


def test_pattern_summary_and_monitor_see_the_experts(mixture_model: Make) -> None:
    model = prepare(mixture_model(), Recipe("8:8"))
    set_pattern(model, "2:4")
    figures = {layer.name: layer for layer in summary(model).layers}
    layer = figures["model.layers.1.mlp.experts.gate_up_proj"]
    assert (layer.matrices, layer.out_features, layer.in_features, layer.pattern) == (4, 64, 64, "2:4")
    assert layer.holds_pattern and layer.zeros >= 0.5 and len(layer.scale) == 8
    assert "4x64x64" in str(summary(model))
    sizes = 4 * (64 * 64 + 64 * 32) + 2 * 64 * 64 + 2 * 32 * 64
    assert summary(model).weights == 2 * sizes
    _, readings = MaskMonitor().read(model)
    assert set(readings) == set(figures)


def test_weights_made_once_a_step_train_the_same_bit_for_bit(mixture_model: Make) -> None:
    model = prepare(mixture_model(), Recipe("6:8")).train()
    other = copy.deepcopy(model)
    made = StepWeights(other)
    losses: list[list[torch.Tensor]] = [[], []]
    for run, one in enumerate((model, other)):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        for _ in range(3):
            if run:
                made.refresh()
            loss = one(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[run].append(loss.detach())
    assert losses[0] == losses[1]
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, another)
    assert made.shapes == {(64, 64), (32, 64)}  # of the linear layers
    made.release()
    assert all(layer.step_weight is None for _, layer in named_layers(other) if isinstance(layer, LatentLayer))


def test_a_residual_is_added_in_training_and_keeps_experts_from_being_packed(mixture_model: Make) -> None:
    experts = experts_of(prepare(mixture_model(num_hidden_layers=1), Recipe("2:4")))
    layer = experts.layers["down_proj"]
    plain = layer.effective_weight(torch.float32, training=True)
    set_residual(experts, 0.25)
    found = layer.effective_weight(torch.float32, training=True)
    torch.testing.assert_close(found, plain + 0.25 * experts.down_proj)
    assert torch.equal(layer.effective_weight(torch.float32, training=False), plain)
    with pytest.raises(ValueError, match=r"trains with 0.25 of its latent weight added"):
        PackedExperts.from_latent(experts)


def test_a_copy_shares_nothing(mixture_model: Make) -> None:
    model = prepare(mixture_model(), Recipe("6:8"))
    other = copy.deepcopy(model)
    set_pattern(other, "2:4")
    with torch.no_grad():
        experts_of(other).down_proj.zero_()
    assert str(experts_of(model).layers["down_proj"].recipe.pattern) == "6:8"
    assert bool(experts_of(model).layers["down_proj"].weight.any())
    assert not bool(experts_of(other).layers["down_proj"].weight.any())


@pytest.mark.parametrize("compiled", [False, True])
def test_the_grouped_product_of_bf16_is_that_of_every_expert(compiled: bool) -> None:
    x = torch.randn(10, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(3, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([4, 4, 10], dtype=torch.int32)
    run = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True) if compiled else grouped_linear
    found, upstream = run(x, weight, ends), torch.randn(10, 8, dtype=torch.bfloat16)
    gradients = torch.autograd.grad(found, (x, weight), upstream)
    expected = torch.cat([F.linear(rows, one) for rows, one in zip(x.split([4, 0, 6]), weight, strict=True)])
    torch.testing.assert_close(found, expected)
    for one, another in zip(gradients, torch.autograd.grad(expected, (x, weight), upstream), strict=True):
        torch.testing.assert_close(one, another)


def test_under_autocast_and_compiled_without_a_break(mixture_model: Make) -> None:
    experts = experts_of(prepare(mixture_model(), Recipe("6:8")))
    x, index, share = routed()
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, index, share)
        compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)(x, index, share)
    assert y.dtype == torch.float32
    exact = experts(x, index, share)
    assert float(((y - exact).norm() / y.norm()).detach()) < 2e-2  # products in bf16
    torch.testing.assert_close(compiled, y, rtol=1e-2, atol=1e-4)
    compiled.sum().backward()
    assert experts.gate_up_proj.grad is not None and bool(experts.gate_up_proj.grad[0].any())
