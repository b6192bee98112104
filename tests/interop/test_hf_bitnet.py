"""Exports that transformers opens in a process that does not know this package, with the logits of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from sparse_bitnet import Recipe, convert, prepare
from sparse_bitnet.interop.hf_bitnet import export_hf_bitnet

READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert "sparse_bitnet" not in sys.modules
with torch.no_grad():
    logits = model(torch.arange(1, 21).view(1, -1)).logits[0, -1].float()
torch.save(logits, sys.argv[2])
print(type(model.model.layers[0].mlp.up_proj).__name__, type(model.lm_head).__name__)
"""
SHAPE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def lively(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_stock_transformers_opens_it_and_gives_our_logits(
    kind: str, dense_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    dense = dense_model() if kind == "qwen2" else None
    if dense is None:
        config = Qwen3Config(**SHAPE, head_dim=16) if kind == "qwen3" else LlamaConfig(**SHAPE)
        dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = prepare(lively(dense), Recipe("6:8"), ignore=["lm_head", "layers.1.self_attn.o_proj"])
    model.save_pretrained(tmp_path / "latent")
    size = export_hf_bitnet(str(tmp_path / "latent"), tmp_path / "stock")
    assert size == sum(file.stat().st_size for file in (tmp_path / "stock").iterdir())
    with torch.no_grad():
        expected = convert(model)(torch.arange(1, 21).view(1, -1)).logits[0, -1]
    command = [sys.executable, "-c", READ, str(tmp_path / "stock"), str(tmp_path / "logits.pt")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == ["AutoBitLinear", "Linear"]
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_what_it_has_no_form_for_is_refused(
    dense_model: Callable[..., PreTrainedModel], latent_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    dense_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="has no ternary weights"):
        export_hf_bitnet(str(tmp_path / "dense"), tmp_path / "stock")
    latent_model(Recipe("6:8", activations="int4")).save_pretrained(tmp_path / "int4")
    with pytest.raises(ValueError, match="activations='int4': transformers' bitnet layers have int8"):
        export_hf_bitnet(str(tmp_path / "int4"), tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_the_config_names_what_stays_dense(latent_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    convert(latent_model()).save_pretrained(tmp_path / "packed")
    export_hf_bitnet(str(tmp_path / "packed"), tmp_path / "stock")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    assert config["model_type"] == "qwen2"
