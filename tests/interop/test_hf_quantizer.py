"""Checkpoints through transformers: what is saved is what is opened, and what is damaged is refused in a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
)

from sparse_bitnet import Recipe, convert, prepare, set_pattern
from sparse_bitnet.engine.architecture import obstacle
from sparse_bitnet.interop.gguf import export_gguf
from sparse_bitnet.interop.hf_bitnet import export_hf_bitnet
from sparse_bitnet.nn.layer import LatentLayer, PackedLayer
from sparse_bitnet.nn.stored_settings import named_layers

Make = Callable[..., PreTrainedModel]
IDS = torch.arange(40).view(2, 20)


def save(model: PreTrainedModel, directory: Path, **options: object) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def same_codes(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    layers = dict(named_layers(other))
    for name, layer in named_layers(one):
        match layer, layers[name]:
            case PackedLayer() as a, PackedLayer() as b:
                same = torch.equal(a.weight, b.weight) and torch.equal(a.weight_scale, b.weight_scale)
            case LatentLayer() as a, LatentLayer() as b:
                same = torch.equal(a.weight, b.weight)
            case _:
                same = False
        if not same or layer.recipe != layers[name].recipe or layer.parts != layers[name].parts:
            return False
    return len(layers) > 0


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_a_latent_checkpoint_opens_equal_and_trainable(latent_model: Make, tmp_path: Path, shard: str) -> None:
    model = latent_model(Recipe("2:4", activations="int4"))
    opened = AutoModelForCausalLM.from_pretrained(save(model, tmp_path, max_shard_size=shard))
    assert same_codes(model, opened)
    assert torch.equal(model(IDS).logits, opened(IDS).logits)
    opened(IDS, labels=IDS).loss.backward()
    assert opened.model.layers[0].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("recipe", [Recipe("6:8"), Recipe("2:4", values="sign"), Recipe("3:4", activations="none")])
def test_a_packed_checkpoint_opens_with_equal_codes_and_scales(
    latent_model: Make, tmp_path: Path, shard: str, recipe: Recipe
) -> None:
    model = convert(latent_model(recipe))
    opened = AutoModelForCausalLM.from_pretrained(save(model, tmp_path, max_shard_size=shard))
    assert same_codes(model, opened)
    assert torch.equal(model(IDS).logits, opened(IDS).logits)


def test_packed_codes_and_scales_are_those_of_the_latent_forward_pass(latent_model: Make, tmp_path: Path) -> None:
    latent = latent_model()
    expected = {name: layer.quantize_weight() for name, layer in named_layers(latent)}
    opened = AutoModelForCausalLM.from_pretrained(save(convert(latent), tmp_path))
    for name, layer in named_layers(opened):
        codes, scale = expected[name]
        assert torch.equal(layer.codes(), codes)
        assert torch.equal(layer.weight_scale, scale.half().float())


def test_packed_scales_stay_fp32_when_opened_in_bf16(latent_model: Make, tmp_path: Path) -> None:
    model = convert(latent_model())
    opened = AutoModelForCausalLM.from_pretrained(save(model, tmp_path), dtype=torch.bfloat16)
    assert same_codes(model, opened)
    assert opened.model.embed_tokens.weight.dtype == torch.bfloat16
    assert opened(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "config",
    [
        Phi3Config(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
                   num_key_value_heads=2, pad_token_id=0),
        GPTNeoXConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4),
    ],
    ids=["phi3", "gpt-neox"],
)  # fmt: skip
def test_fused_projections_keep_a_scale_for_each_part(config: Phi3Config | GPTNeoXConfig, tmp_path: Path) -> None:
    model = convert(prepare(AutoModelForCausalLM.from_config(config, dtype=torch.float32), Recipe()))
    opened = AutoModelForCausalLM.from_pretrained(save(model, tmp_path))
    assert any(len(layer.weight_scale) == 3 for _, layer in named_layers(opened))
    assert same_codes(model, opened)
    assert torch.equal(model(IDS).logits, opened(IDS).logits)


@pytest.mark.parametrize("packs", [False, True])
def test_another_head_is_new_and_dense(latent_model: Make, tmp_path: Path, packs: bool) -> None:
    model = convert(latent_model()) if packs else latent_model()
    opened = AutoModelForSequenceClassification.from_pretrained(save(model, tmp_path), num_labels=4)
    assert type(opened.score) is nn.Linear and opened.score.out_features == 4
    expected = model.eval().model(IDS).last_hidden_state
    assert torch.equal(opened.eval().model(IDS).last_hidden_state, expected)


def test_a_latent_model_has_no_weights_to_give_back(latent_model: Make, tmp_path: Path) -> None:
    opened = AutoModelForCausalLM.from_pretrained(save(latent_model(), tmp_path))
    with pytest.raises(ValueError, match=r"is latent, .*: pack the model with convert\(\)"):
        opened.dequantize()


def test_parts_that_are_none_of_the_rows_are_told_when_opened(dense_model: Make, tmp_path: Path) -> None:
    parts = {"mlp.up_proj": (dense_model().config.intermediate_size // 2,) * 2}
    directory = save(convert(prepare(dense_model(), Recipe(), parts=parts)), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    stored = config["quantization_config"]["parts"]
    stored[next(iter(stored))] = [25, 25]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"up_proj: .* rows do not divide into parts of \(25, 25\)"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_the_base_model_opens_without_its_head(latent_model: Make, tmp_path: Path) -> None:
    model = convert(latent_model())
    base = AutoModel.from_pretrained(save(model, tmp_path))
    assert torch.equal(model.model(IDS).last_hidden_state, base(IDS).last_hidden_state)


def test_layers_left_out_are_left_out_when_opened(dense_model: Make, tmp_path: Path) -> None:
    model = convert(prepare(dense_model(), Recipe(), targets=["mlp"], ignore=["lm_head", "layers.1"]))
    opened = AutoModelForCausalLM.from_pretrained(save(model, tmp_path))
    assert {name for name, _ in named_layers(opened)} == {
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    assert torch.equal(model(IDS).logits, opened(IDS).logits)


def test_a_checkpoint_opens_again_after_another_pattern_and_another_save(latent_model: Make, tmp_path: Path) -> None:
    opened = AutoModelForCausalLM.from_pretrained(save(latent_model(), tmp_path / "6_8"))
    set_pattern(opened, "2:4")
    again = AutoModelForCausalLM.from_pretrained(save(opened, tmp_path / "2_4"))
    assert {str(layer.recipe.pattern) for _, layer in named_layers(again)} == {"2:4"}


def test_dequantize_gives_plain_linear_layers_with_the_same_weights(latent_model: Make, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save(convert(latent_model(Recipe(activations="none"))), tmp_path))
    before = model(IDS).logits
    plain = model.dequantize()
    assert not list(named_layers(plain))
    assert torch.allclose(plain(IDS).logits, before, atol=1e-5)
    assert "quantization_config" not in plain.config.to_dict()


def test_generation_from_a_packed_checkpoint(latent_model: Make, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save(convert(latent_model()), tmp_path))
    written = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(IDS[:1]))
    assert written.shape == (1, 25)


@pytest.mark.parametrize("first", ["sparse_bitnet", "transformers"])
def test_the_reader_is_registered_in_either_order_of_imports(latent_model: Make, tmp_path: Path, first: str) -> None:
    save(convert(latent_model()), tmp_path)
    code = f"import {first}; import sparse_bitnet, transformers; from transformers import AutoModelForCausalLM as A;"
    code += f"m = A.from_pretrained({str(tmp_path)!r}); print(type(m.model.layers[0].mlp.up_proj).__name__)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split()[-1] == "PackedLinear"


def test_without_this_package_a_packed_checkpoint_fails_loudly(latent_model: Make, tmp_path: Path) -> None:
    save(convert(latent_model()), tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode != 0
    assert "size mismatch" in answer.stderr or "mismatched" in answer.stderr


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2 is unknown, this package reads version 1: upgrade sparse-bitnet"),
        ({"pattern": "9:8"}, "pattern 9:8: n must lie between 1 and m=8"),
        ({"pattern": "48:64"}, "m must lie between 2 and 32"),
        ({"format": "i3"}, "format 'i3' is unknown: use one of g4s3"),
        ({"values": "binary"}, "values='binary' is not one of ternary, sign, full"),
        ({"colour": "red"}, "unknown recipe setting 'colour'"),
        ({"pattern": "6:7"}, "in_features=64 is not a multiple of m=7 (model.layers.0.self_attn.q_proj, pattern 6:7)"),
    ],
)
def test_unknown_settings_are_refused_by_name(
    latent_model: Make, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    edit_config(save(convert(latent_model()), tmp_path), **changes)
    with pytest.raises(ValueError, match=r".*") as refusal:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert message in str(refusal.value)


def test_a_missing_tensor_is_refused_by_name(latent_model: Make, tmp_path: Path) -> None:
    file = save(convert(latent_model()), tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.weight_scale is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("weight", 255, "model.layers.1.mlp.down_proj.weight is not of format i2"),
        ("weight_scale", float("nan"), "model.layers.1.mlp.down_proj.weight_scale is not a positive number"),
        ("weight_scale", 0, "model.layers.1.mlp.down_proj.weight_scale is not a positive number"),
    ],
)
def test_damaged_values_are_refused_by_name(
    latent_model: Make, tmp_path: Path, tensor: str, value: float, message: str
) -> None:
    file = save(convert(latent_model()), tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.1.mlp.down_proj.{tensor}"].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_mixture_opens_equal_with_its_experts(mixture_model: Make, tmp_path: Path, kind: str, packed: bool) -> None:
    mixtral = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    model = mixture_model() if kind == "qwen3_moe" else AutoModelForCausalLM.from_config(mixtral, dtype=torch.float32)
    prepare(model, Recipe("2:4"))
    names = set(load_file(save(model, tmp_path / "latent") / "model.safetensors"))
    dense = set(
        load_file(save(AutoModelForCausalLM.from_config(model.config), tmp_path / "dense") / "model.safetensors")
    )
    assert names == dense  # the usual ones, expert by expert
    if packed:
        save(convert(model), tmp_path / "packed", max_shard_size="20KB")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / ("packed" if packed else "latent"))
    assert {type(module).__name__ for module in opened.modules()} & {"SparseBitExperts", "PackedExperts"}
    assert same_codes(model, opened)
    assert torch.equal(model(IDS).logits, opened(IDS).logits)
    again = AutoModelForCausalLM.from_pretrained(save(opened, tmp_path / "again"))
    assert same_codes(model, again)
    if not packed:
        opened(IDS, labels=IDS).loss.backward()
        assert bool(opened.model.layers[0].mlp.experts.down_proj.grad.any())


def test_experts_that_were_left_dense_stay_dense(mixture_model: Make, tmp_path: Path) -> None:
    model = convert(prepare(mixture_model(), Recipe(), ignore=["lm_head", "layers.1.mlp.experts"]))
    opened = AutoModelForCausalLM.from_pretrained(save(model, tmp_path))
    kinds = [type(layer.mlp.experts).__name__ for layer in opened.model.layers]
    assert kinds == ["PackedExperts", "Qwen3MoeExperts"]
    assert torch.equal(model(IDS).logits, opened(IDS).logits)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("experts.down_proj_scale", r"layers.1.mlp.experts.down_proj_scale is missing"),
        ("experts.2.up_proj.weight", r"layers.1.mlp.experts.2.up_proj.weight is missing"),
    ],
)
def test_a_missing_tensor_of_the_experts_is_refused(
    mixture_model: Make, tmp_path: Path, tensor: str, message: str
) -> None:
    file = save(convert(prepare(mixture_model(), Recipe())), tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.mlp.{tensor}"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_damaged_codes_of_one_expert_are_refused(mixture_model: Make, tmp_path: Path) -> None:
    file = save(convert(prepare(mixture_model(), Recipe())), tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][0, 0] = 255
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.gate_up_proj.weight is not of format i2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_reads_linear_layers_alone_refuses_a_mixture_in_a_sentence(mixture_model: Make, tmp_path: Path) -> None:
    directory = save(convert(prepare(mixture_model(), Recipe())), tmp_path / "packed")
    with pytest.raises(ValueError, match="experts of a mixture: transformers' bitnet has linear layers alone"):
        export_hf_bitnet(str(directory), tmp_path / "stock")
    with pytest.raises(ValueError, match="model_type qwen3_moe is not one that can be exported: qwen2, qwen3, llama"):
        export_gguf(str(directory), tmp_path / "model.gguf")
    assert obstacle(str(directory)) == "model_type 'qwen3_moe' is none of qwen2, qwen3, llama"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed"]
