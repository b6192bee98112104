"""Small packed models of the architectures that the engine has, on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from sparse_bitnet import Recipe, convert, prepare

CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


def make_model(kind: str, recipe: Recipe | None = None, format: str = "auto", **settings: Any) -> PreTrainedModel:
    """Packed, 2 layers, 64 wide, for 320 tokens, with biases and norms that are not as they begin."""
    shape = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 136,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 640,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    config = CONFIGS[kind](**(shape | settings))
    model = prepare(AutoModelForCausalLM.from_config(config, dtype=torch.float32), recipe or Recipe("6:8"))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        elif "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return convert(model, format).eval()


@pytest.fixture
def packed(tmp_path: Path) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """Makes such a model: in memory, and the directory that holds it."""

    def make(kind: str = "qwen2", recipe: Recipe | None = None, **settings: Any) -> tuple[PreTrainedModel, Path]:
        model = make_model(kind, recipe, **settings)
        model.save_pretrained(tmp_path / kind)
        return model, tmp_path / kind

    return make
