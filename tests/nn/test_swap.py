"""prepare, set_pattern and convert on real modules: what is exchanged, what is left, what a refusal changes: nothing.

Numbers are compared with means taken over the rows by hand, and the packed model with the latent one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CodeGenConfig,
    GemmaConfig,
    GPTNeoXConfig,
    JetMoeConfig,
    LlamaConfig,
    MiniMaxConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from sparse_bitnet.nn.loading import unpack_to_linear
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.nn.swap import convert, prepare, set_pattern
from sparse_bitnet.numerics.ternary import scale_by_row
from sparse_bitnet.recipe import Recipe

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = TINY | {"num_key_value_heads": 2}
SPLIT = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16),
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED),
    "gemma": lambda: GemmaConfig(**GROUPED, head_dim=16),
    "phi3": lambda: Phi3Config(**GROUPED),
    "gpt_neox": lambda: GPTNeoXConfig(**TINY),
}
EXCHANGED = dict.fromkeys(CONFIGS, SPLIT) | {
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
}
PARTS = {"qkv_proj": (64, 32, 32), "gate_up_proj": (128, 128), "query_key_value": (16, 16, 16)}


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tokens() -> torch.Tensor:
    return torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(1))


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(*pair) for pair in pairwise(widths)]
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))


def stack() -> nn.Module:
    """layers.{0..10} of self_attn.{q_proj, o_proj} and mlp.up, 16 wide, and a lm_head."""

    def block() -> nn.Module:
        attention = nn.ModuleDict({"q_proj": nn.Linear(16, 16), "o_proj": nn.Linear(16, 16)})
        return nn.ModuleDict({"self_attn": attention, "mlp": nn.ModuleDict({"up": nn.Linear(16, 32)})})

    return nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(11)), "lm_head": nn.Linear(16, 8)})


def types(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def prepared_names(model: nn.Module) -> set[str]:
    return {name for name, _ in named_layers(model)}


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of two results, relative to the first."""
    return float((one - other).detach().norm() / one.detach().norm())


def test_plain_module_is_prepared_trained_and_packed() -> None:
    model = mlp(16, 32, 8)
    parameters = dict(model.named_parameters())
    assert prepare(model, Recipe("6:8")) is model
    assert {name: value is parameters[name] for name, value in model.named_parameters()} == dict.fromkeys(
        parameters, True
    )
    assert types(model)["0"] is types(model)["2"] is SparseBitLinear
    x = torch.randn(5, 16)
    y = model(x)
    y.square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())
    assert convert(model) is model
    assert types(model)["0"] is types(model)["2"] is PackedLinear
    assert difference(y, model(x)) < 5e-3  # scales in fp16, and int8 steps that they move


@pytest.mark.parametrize("kind", CONFIGS)
def test_exchanges_every_projection_and_nothing_else(kind: str) -> None:
    model = model_of(CONFIGS[kind]())
    before = types(model)
    expected = {name for name in before if name.rpartition(".")[2] in EXCHANGED[kind]}
    assert len(expected) == 2 * len(EXCHANGED[kind])
    prepare(model, Recipe("6:8"))
    assert types(model) == before | dict.fromkeys(expected, SparseBitLinear)


@pytest.mark.parametrize("kind", CONFIGS)
def test_trains_and_packs_to_the_same_logits(kind: str) -> None:
    model = prepare(model_of(CONFIGS[kind]()), Recipe("6:8"))
    output = model(tokens(), labels=tokens())
    output.loss.backward()
    for _, layer in named_layers(model):
        assert layer.weight.grad is not None and bool(layer.weight.grad.isfinite().all())
        assert bool(layer.weight.grad.any())
    codes = {name: layer.quantize_weight()[0] for name, layer in named_layers(model)}
    convert(model)
    assert all(torch.equal(layer.codes(), codes[name]) for name, layer in named_layers(model))
    assert difference(output.logits, model(tokens()).logits) < 5e-3  # scales in fp16, and int8 steps that they move


@pytest.mark.parametrize("kind", CONFIGS)
def test_packs_to_the_same_logits_but_for_fp32_rounding_where_the_scales_fit_fp16(kind: str) -> None:
    model = prepare(model_of(CONFIGS[kind]()), Recipe("6:8", activations="none"))
    for _, layer in named_layers(model):
        scale = layer.quantize_weight()[1]
        layer.weight.data *= scale_by_row(scale.half().float() / scale, layer.parts, layer.out_features)
    latent = model(tokens()).logits.detach()
    torch.testing.assert_close(convert(model)(tokens()).logits, latent, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_unpacks_to_plain_linear_layers_with_the_same_logits(kind: str) -> None:
    model = convert(prepare(model_of(CONFIGS[kind]()), Recipe("6:8", activations="none")))
    before = {name: nn.Linear if found is PackedLinear else found for name, found in types(model).items()}
    packed = model(tokens()).logits
    unpack_to_linear(model, torch.float32)
    assert types(model) == before
    torch.testing.assert_close(model(tokens()).logits, packed, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "gemma", "llama", "gpt_neox"])
def test_head_and_embeddings_stay_as_they_are(kind: str) -> None:
    model = model_of(CONFIGS[kind]())
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    assert tied == (kind in ("qwen2", "gemma"))
    before = head.weight.clone()
    convert(prepare(model, Recipe("6:8")))
    assert model.get_output_embeddings() is head and type(head) is nn.Linear
    assert model.get_input_embeddings() is embeddings
    assert (head.weight is embeddings.weight) == tied
    assert torch.equal(head.weight, before)


def test_head_is_known_by_any_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.unembed = nn.Linear(16, 16), nn.Linear(16, 8)

        def get_output_embeddings(self) -> nn.Module:
            return self.unembed

    assert prepared_names(prepare(Model(), Recipe("6:8"))) == {"body"}
    assert prepared_names(prepare(Model(), Recipe("6:8"), ignore=())) == {"body", "unembed"}


@pytest.mark.parametrize("kind", ["phi3", "gpt_neox", "llama"])
def test_fused_projections_get_their_parts(kind: str) -> None:
    for name, layer in named_layers(prepare(model_of(CONFIGS[kind]()), Recipe("6:8"))):
        assert layer.parts == PARTS.get(name.rpartition(".")[2], ())
        assert len(layer.quantize_weight()[1]) == max(1, len(layer.parts))


def test_stacked_q_k_and_v_each_have_the_mean_of_their_rows() -> None:
    model = prepare(model_of(CONFIGS["phi3"]()), Recipe("6:8"))
    for layer in model.model.layers:
        weight = layer.self_attn.qkv_proj.weight.data
        weight[64:96] *= 2
        weight[96:] *= 5
        q, k, v = (rows.double().abs().mean().float() for rows in weight.split((64, 32, 32)))
        assert layer.self_attn.qkv_proj.quantize_weight()[1].tolist() == [q.item(), k.item(), v.item()]


def test_interleaved_q_k_and_v_each_have_the_mean_over_all_heads() -> None:
    model = prepare(model_of(CONFIGS["gpt_neox"]()), Recipe("6:8"))
    for layer in model.gpt_neox.layers:
        fused = layer.attention.query_key_value
        fused.weight.data *= torch.arange(1, 193).unsqueeze(-1)
        rows_of_q = [row for head in range(4) for row in range(48 * head, 48 * head + 16)]
        rows = [[row + 16 * index for row in rows_of_q] for index in range(3)]
        expected = [fused.weight.data[part].double().abs().mean().float().item() for part in rows]
        assert fused.quantize_weight()[1].tolist() == expected
        assert len(set(expected)) == 3


def test_codegen_projection_is_not_taken_for_stacked() -> None:
    size = {"vocab_size": 128, "n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8}
    model = model_of(CodeGenConfig(**size, bos_token_id=0, eos_token_id=0))
    prepare(model, Recipe("6:8"))
    assert model.transformer.h[0].attn.qkv_proj.parts == (16, 16, 16)


def test_minimax_projection_is_not_taken_for_stacked() -> None:
    model = model_of(MiniMaxConfig(**GROUPED, head_dim=16, num_local_experts=2, layer_types=["linear_attention"] * 2))
    prepare(model, Recipe("6:8"))
    assert model.model.layers[0].self_attn.qkv_proj.parts == (16, 16, 16)


def test_router_of_a_mixture_stays_as_it_is() -> None:
    model = model_of(JetMoeConfig(**GROUPED, kv_channels=16, num_local_experts=4))
    routers = {name: found for name, found in types(model).items() if "router" in name}
    assert nn.Linear in routers.values()
    prepare(model, Recipe("6:8"), ignore=["lm_head", "*.experts.*", "mlp.input_linear", "mlp.output_linear"])
    assert {name: found for name, found in types(model).items() if "router" in name} == routers


def test_parts_may_be_given_by_entry() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"in_proj": nn.Linear(16, 24)}), "b": nn.Linear(16, 24)})
    prepare(model, Recipe("6:8"), parts={"in_proj": (8, 16), "b": [12, 12]})
    assert {name: layer.parts for name, layer in named_layers(model)} == {"a.in_proj": (8, 16), "b": (12, 12)}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["mlp"], {f"layers.{i}.mlp.up" for i in range(11)}),
        (["layers.1"], {"layers.1.self_attn.q_proj", "layers.1.self_attn.o_proj", "layers.1.mlp.up"}),
        (["self_attn.q_proj"], {f"layers.{i}.self_attn.q_proj" for i in range(11)}),
        (["layers.1.mlp.up", "layers.2.mlp"], {"layers.1.mlp.up", "layers.2.mlp.up"}),
        (["*.1?.mlp.*"], {"layers.10.mlp.up"}),
        (["layers.[34].*.o_proj"], {"layers.3.self_attn.o_proj", "layers.4.self_attn.o_proj"}),
    ],
    ids=["mlp", "layers.1", "q_proj", "two", "*.1?.mlp.*", "[34]"],
)
def test_targets_are_whole_segments_or_globs(targets: list[str], expected: set[str]) -> None:
    assert prepared_names(prepare(stack(), Recipe("6:8"), targets=targets)) == expected


def test_one_entry_may_be_given_as_text() -> None:
    model = prepare(nn.ModuleDict({"mlp": nn.Linear(16, 8), "head": nn.Linear(16, 8)}), Recipe(), targets="mlp")
    assert [name for name, _ in named_layers(model)] == ["mlp"]


def test_ignore_follows_the_same_rule_and_wins_over_targets() -> None:
    model = prepare(stack(), Recipe("6:8"), targets=["layers.0", "lm_head"], ignore=["self_attn"])
    assert prepared_names(model) == {"layers.0.mlp.up", "lm_head"}
    model = prepare(stack(), Recipe("6:8"), targets=["layers.0", "lm_head"], ignore=["*.o_proj", "lm_head"])
    assert prepared_names(model) == {"layers.0.self_attn.q_proj", "layers.0.mlp.up"}


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ["mlp", "q_pro"]},
        {"ignore": ["q_pro", "lm_head"]},
        {"parts": {"q_pro": (8, 8)}},
    ],
    ids=["targets", "ignore", "parts"],
)
def test_entry_that_matches_nothing_warns(settings: dict) -> None:
    with pytest.warns(UserWarning, match="'q_pro' matches no layer of the model") as warned:
        prepare(stack(), Recipe("6:8"), **settings)
    assert [warning.filename for warning in warned] == [__file__]


def test_a_head_that_is_the_embedding_is_refused_with_the_remedy() -> None:
    config = Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"lm_head shares its weight with the embedding, .*: add it to `ignore`"):
        prepare(model, Recipe("6:8"), ignore=["layers.0.mlp"])
    assert prepared_names(model) == set()


def test_lm_head_may_be_missing_without_a_warning() -> None:
    assert prepared_names(prepare(mlp(16, 8), Recipe("6:8"))) == {"0"}


def test_nothing_chosen_warns_and_changes_nothing() -> None:
    model = nn.Sequential(nn.ReLU())
    with pytest.warns(UserWarning, match="nothing is prepared"):
        assert prepare(model, Recipe("6:8")) is model


def test_width_that_does_not_divide_is_refused_by_name_with_nothing_changed() -> None:
    model = mlp(16, 12, 8)
    before = types(model)
    with pytest.raises(ValueError, match=r"in_features=12 is not a multiple of m=8 \(2, pattern 6:8\)"):
        prepare(model, Recipe("6:8"))
    assert types(model) == before


def test_width_that_does_not_divide_may_be_skipped_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"^2 is left as it is: in_features=12 is not a multiple of m=8$"):
        model = prepare(mlp(16, 12, 8), Recipe("6:8"), indivisible="skip")
    assert prepared_names(model) == {"0"}
    assert type(model[2]) is nn.Linear


def test_a_width_that_does_not_divide_is_no_matter_where_it_is_ignored() -> None:
    assert prepared_names(prepare(mlp(16, 12, 8), Recipe("6:8"), ignore=["2"])) == {"0"}


def test_another_recipe_is_refused_with_nothing_changed() -> None:
    model = prepare(mlp(16, 16, 8), Recipe("6:8"), targets=["0"])
    before = types(model)
    with pytest.raises(ValueError, match="already prepared as 6:8,ternary"):
        prepare(model, Recipe("2:4"))
    assert types(model) == before


def test_the_same_recipe_may_be_given_more_layers() -> None:
    model = prepare(mlp(16, 16, 8), Recipe("6:8"), targets=["0"])
    first = model[0]
    prepare(model, Recipe("6:8"))
    assert prepared_names(model) == {"0", "2"}
    assert model[0] is first


def test_refused_mixture_of_packed_and_latent_changes_nothing() -> None:
    model = convert(prepare(model_of(CONFIGS["qwen2"]()), Recipe("6:8"), targets=["mlp"]))
    before = types(model)
    with pytest.raises(ValueError, match="is packed already"):
        prepare(model, Recipe("6:8"), targets=["self_attn"])
    assert types(model) == before


def test_a_layer_used_under_two_names_stays_one() -> None:
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU()), "c": nn.Linear(16, 16)})
    prepare(model, Recipe("6:8"))
    assert model["a"] is model["b"][0] and type(model["a"]) is SparseBitLinear
    assert model["a"].weight is shared.weight
    convert(model)
    assert model["a"] is model["b"][0] and type(model["a"]) is PackedLinear
    assert type(model["c"]) is PackedLinear


def test_a_block_used_twice_stays_one() -> None:
    block = mlp(16, 16)
    model = prepare(nn.Sequential(block, block), Recipe("6:8"))
    assert model[0] is model[1]
    assert type(model[0][0]) is SparseBitLinear


def test_multihead_attention_is_left_alone() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32)
    attention = model.self_attn.out_proj
    prepare(model, Recipe("6:8"))
    assert model.self_attn.out_proj is attention and type(attention) is not SparseBitLinear
    assert prepared_names(model) == {"linear1", "linear2"}


def test_subclasses_of_linear_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    model = prepare(nn.Sequential(Own(16, 16), nn.Linear(16, 16)), Recipe("6:8"))
    assert [type(layer) for layer in model] == [Own, SparseBitLinear]


def test_a_model_that_is_one_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"use SparseBitLinear\.from_linear"):
        prepare(nn.Linear(16, 16), Recipe("6:8"))


def test_set_pattern_reaches_every_layer_and_keeps_the_rest_of_the_recipe() -> None:
    model = prepare(mlp(16, 16, 8), Recipe("8:8", values="sign", gradient="masked"))
    set_pattern(model, "2:4")
    assert {layer.recipe for _, layer in named_layers(model)} == {Recipe("2:4", values="sign", gradient="masked")}


def test_set_pattern_that_does_not_divide_changes_nothing() -> None:
    model = prepare(mlp(16, 24, 8), Recipe("6:8"))
    with pytest.raises(ValueError, match=r"in_features=24 is not a multiple of m=16 \(2, pattern 12:16\)"):
        set_pattern(model, "12:16")
    assert {str(layer.recipe.pattern) for _, layer in named_layers(model)} == {"6:8"}


@pytest.mark.parametrize("model", [mlp(16, 8), nn.Sequential(PackedLinear(16, 8))], ids=["plain", "packed"])
def test_set_pattern_needs_trainable_layers(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no trainable sparse ternary layers: call prepare\(model, recipe\) first"):
        set_pattern(model, "2:4")


def test_the_config_says_what_the_model_is() -> None:
    model = prepare(model_of(CONFIGS["phi3"]()), Recipe("8:8"))
    assert model.config.quantization_config["format"] == "latent"
    set_pattern(model, "6:8")
    assert model.config.quantization_config["pattern"] == "6:8"
    convert(model, "i2")
    stored = model.config.quantization_config
    assert (stored["quant_method"], stored["format"], stored["ignore"]) == ("sparse_bitnet", "i2", ["lm_head"])
    assert stored["parts"]["model.layers.1.self_attn.qkv_proj"] == [64, 32, 32]


@pytest.mark.parametrize("model", [mlp(16, 8), nn.Sequential(PackedLinear(16, 8))], ids=["plain", "packed"])
def test_convert_needs_something_to_pack(model: nn.Module) -> None:
    before = types(model)
    with pytest.raises(ValueError, match="no trainable sparse ternary layers"):
        convert(model)
    assert types(model) == before


def test_convert_refuses_full_values_with_nothing_changed() -> None:
    model = prepare(mlp(16, 16, 8), Recipe("6:8", values="full"))
    before = types(model)
    with pytest.raises(ValueError, match="values='full'"):
        convert(model)
    assert types(model) == before


@pytest.mark.parametrize("format", ["i3", "latent"])
def test_convert_refuses_an_unknown_format_with_nothing_changed(format: str) -> None:
    model = prepare(mlp(16, 16, 8), Recipe("6:8"))
    before = types(model)
    with pytest.raises(ValueError, match=f"format '{format}' is unknown"):
        convert(model, format)
    assert types(model) == before


def test_convert_refuses_a_nan_by_name_with_nothing_changed() -> None:
    model = prepare(mlp(16, 16, 8), Recipe("6:8"))
    before = types(model)
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^2: the weight holds NaN or infinity"):
        convert(model)
    assert types(model) == before


def test_what_is_no_model_or_no_recipe_is_told() -> None:
    for model, recipe, given in (
        (nn.Linear(8, 8), "6:8", "Linear and str"),
        (None, Recipe("6:8"), "NoneType and Recipe"),
    ):
        with pytest.raises(TypeError, match=rf"takes a torch.nn.Module and a Recipe, .* and not {given}"):
            prepare(model, recipe)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_that_are_not_fp32_are_told(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    with pytest.warns(UserWarning, match=f"weights are in {dtype}, in which small updates are lost: open the model"):
        prepare(model.to(dtype), Recipe("6:8"))
    prepare(nn.Sequential(nn.Linear(16, 8)).to(dtype).requires_grad_(False), Recipe("6:8"))


def test_layers_that_are_no_linear_ones_are_named() -> None:
    model = nn.Sequential(Conv1D(16, 16))
    with pytest.warns(UserWarning, match="no nn.Linear layer of the model was chosen, as they are Conv1D"):
        prepare(model, Recipe("6:8"))
