"""GGUF files in stock llama.cpp: the next token of our model, and its probabilities to what 8-bit blocks explain."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config

from interop.llama_cpp import llama_cpp, log_probabilities, needs_llama
from sparse_bitnet import Recipe, convert, prepare
from sparse_bitnet.interop.gguf import export_gguf
from sparse_bitnet.nn.stored_settings import named_layers

PROMPT = "the cat sat on a mat and the dog ran to the old red barn"
SHAPE = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "qwen2": {},
    "qwen2-untied": {"tie_word_embeddings": False},
    "qwen3": Qwen3Config(**SHAPE, head_dim=64, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "linear-scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "yarn-scaling": {"rope_parameters": YARN},
    "yarn-attention": {"rope_parameters": YARN | {"attention_factor": 6.0}},
    "yarn-mscale": {"rope_parameters": YARN | {"mscale": 40.0, "mscale_all_dim": 1.0}},
    "llama3-scaling": LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=LLAMA3),
}


@pytest.fixture
def saved(
    dense_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """Packs a model with lively biases and norms into a directory, tokenizer included."""

    def make(settings: Any, recipe: Recipe | None = None) -> tuple[PreTrainedModel, Path]:
        torch.manual_seed(1)  # with which no model ends at once
        if isinstance(settings, dict):
            model = dense_model(**(SHAPE | settings))
        else:
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * (0.2 if "bias" in name else 0.1))
        directory = tmp_path / "packed"
        packed = convert(prepare(model, recipe or Recipe("6:8")))
        packed.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return packed, directory

    return make


@needs_llama
@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_gives_what_our_model_gives(
    kind: str, saved: Callable[..., tuple[PreTrainedModel, Path]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, directory = saved(MODELS[kind])
    written = export_gguf(str(directory), tmp_path / "model.gguf")
    assert written.tensors["tq2_0"] == 14
    assert written.remarks == ()
    ids = tokenizer(PROMPT)["input_ids"]
    assert len(ids) > 10
    expected = log_probabilities(model, ids)
    with llama_cpp(tmp_path / "model.gguf") as ask:
        step = ask(PROMPT)  # as text: its tokens are ours too
    assert step["prompt_tokens"] == len(ids)
    assert step["id"] == int(expected.argmax())
    apart = [abs(one["logprob"] - float(expected[one["id"]])) for one in step["top_logprobs"]]
    assert len(apart) == 10
    assert max(apart) < 0.05  # 8-bit activations, rounded by token here and by block there


@needs_llama
@pytest.mark.parametrize("type", ["tq1_0", "tq2_0", "q2_0", "q4_0", "f16"])
def test_every_type_holds_the_weights_exactly_and_runs(
    type: str, saved: Callable[..., tuple[PreTrainedModel, Path]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, directory = saved({})
    file = tmp_path / f"{type}.gguf"
    written = export_gguf(str(directory), file, type)
    assert written.tensors[type] >= 14
    ids = tokenizer(PROMPT)["input_ids"]
    expected = log_probabilities(model, ids)
    with llama_cpp(file) as ask:
        step = ask(ids)
    assert step["id"] == int(expected.argmax())
    if type == "q2_0":
        return  # gguf has no reader of it
    layers = dict(named_layers(model))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, target in (("self_attn.o_proj", "attn_output"), ("mlp.down_proj", "ffn_down")):
        layer = layers[f"model.layers.1.{name}"]
        stored = tensors[f"blk.1.{target}.weight"]
        values = gguf.dequantize(stored.data, stored.tensor_type).reshape(layer.out_features, layer.in_features)
        assert np.array_equal(values, layer.codes().numpy() * layer.weight_scale.numpy())


@needs_llama
def test_the_head_in_8_bits(
    saved: Callable[..., tuple[PreTrainedModel, Path]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, directory = saved({"tie_word_embeddings": False})
    written = export_gguf(str(directory), tmp_path / "model.gguf", embedding="q8_0")
    assert written.tensors["q8_0"] == 2
    ids = tokenizer(PROMPT)["input_ids"]
    expected = log_probabilities(model, ids)
    with llama_cpp(tmp_path / "model.gguf") as ask:
        step = ask(ids)
    assert max(abs(one["logprob"] - float(expected[one["id"]])) for one in step["top_logprobs"]) < 0.1
    with pytest.raises(ValueError, match="--embedding q4_0 is not one of f16, q8_0"):
        export_gguf(str(directory), tmp_path / "other.gguf", embedding="q4_0")


@needs_llama
def test_rows_that_are_no_multiple_take_a_type_that_holds_them(
    saved: Callable[..., tuple[PreTrainedModel, Path]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, directory = saved({"hidden_size": 96, "intermediate_size": 256}, Recipe("2:4"))
    written = export_gguf(str(directory), tmp_path / "model.gguf")
    assert (written.tensors["tq2_0"], written.tensors["q4_0"]) == (2, 12)
    assert "12 weights are stored as q4_0: their rows are no multiple of 256" in written.remarks
    ids = tokenizer(PROMPT)["input_ids"]
    with llama_cpp(tmp_path / "model.gguf") as ask:
        step = ask(ids)
    assert step["id"] == int(log_probabilities(model, ids).argmax())


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, None),
        ({"beta_fast": 32, "beta_slow": None, "truncate": True}, None),
        ({"attention_factor": 2.0}, 2.0 / (0.1 * math.log(4.0) + 1)),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(4.0) + 1) / (0.1 * math.log(4.0) + 1) ** 2),
    ],
)
def test_the_attention_factor_of_yarn_is_written_as_a_multiple_of_the_usual_one(
    more: dict[str, Any],
    expected: float | None,
    saved: Callable[..., tuple[PreTrainedModel, Path]],
    tmp_path: Path,
) -> None:
    _, directory = saved({"rope_parameters": YARN | more})
    export_gguf(str(directory), tmp_path / "model.gguf")
    field = gguf.GGUFReader(tmp_path / "model.gguf").get_field("qwen2.rope.scaling.attn_factor")
    assert (field is None) == (expected is None)
    if field is not None:
        assert field.contents() == pytest.approx(expected, rel=1e-6)  # stored as fp32


@pytest.mark.parametrize(
    ("setting", "told"), [({"beta_fast": 16.0}, "32"), ({"beta_slow": 4.0}, "1"), ({"truncate": False}, "True")]
)
def test_settings_of_yarn_that_llama_cpp_does_not_read_are_refused(
    setting: dict[str, Any], told: str, saved: Callable[..., tuple[PreTrainedModel, Path]], tmp_path: Path
) -> None:
    _, directory = saved({"rope_parameters": YARN | setting})
    ((key, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"{key}={value} of rope_parameters .* qwen2 takes {told} whatever") as caught:
        export_gguf(str(directory), tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.gguf").exists()


def test_a_latent_checkpoint_is_packed_on_the_way(latent_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    latent_model(hidden_size=256, intermediate_size=256).save_pretrained(tmp_path / "latent")
    written = export_gguf(str(tmp_path / "latent"), tmp_path / "model.gguf")
    assert written.tensors["tq2_0"] == 14
    assert "token numbers only" in written.remarks[0]  # no tokenizer lies beside it


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    dense_model: Callable[..., PreTrainedModel], saved: Callable[..., tuple[PreTrainedModel, Path]], tmp_path: Path
) -> None:
    output = tmp_path / "model.gguf"
    dense_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="has no ternary weights"):
        export_gguf(str(tmp_path / "dense"), output)
    prepare(dense_model(), Recipe("2:4", values="full")).save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="not ternary and cannot be packed"):
        export_gguf(str(tmp_path / "full"), output)
    _, directory = saved({})
    with pytest.raises(ValueError, match="--type q8_0 is not one of auto, tq2_0"):
        export_gguf(str(directory), output, "q8_0")
    with pytest.raises(ValueError, match="no directory"):
        export_gguf("some/hub-id", output)
    stored = json.loads((directory / "tokenizer.json").read_text())
    stored["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"
    (directory / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"cuts words in a way that llama.cpp has no name for"):
        export_gguf(str(directory), output)
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"]["rope_type"] = "dynamic"
    config["rope_parameters"]["factor"] = 2.0
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rope_type dynamic is not one that can be exported"):
        export_gguf(str(directory), output)
    assert [path for path in tmp_path.iterdir() if "gguf" in path.name] == []
    output.touch()
    with pytest.raises(ValueError, match=r"model.gguf exists"):
        export_gguf(str(directory), output)
