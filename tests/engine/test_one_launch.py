"""The layers as one op takes them: by its reference a text is that of transformers; the GPU's is in tests/kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_bitnet import Recipe
from sparse_bitnet.engine import one_launch
from sparse_bitnet.engine.cuda_graphs import Sequences
from sparse_bitnet.kernels.decoder_step import decoder_step

Packed = Callable[..., tuple[Any, Path]]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("pattern", ["6:8", "2:4"])
def test_layers_give_the_logits_of_transformers(packed: Packed, kind: str, pattern: str) -> None:
    model = packed(kind, Recipe(pattern))[0]
    text = torch.randint(320, (1, 12), generator=torch.Generator().manual_seed(1))
    expected = model(text).logits[0]
    work = Sequences(model, 1, 16)
    assert one_launch.obstacle(model) is None
    step = decoder_step(one_launch.decoder_of(model, work.layers))
    for position, token in enumerate(text[0]):
        x = model.get_input_embeddings()(token)
        step(x, torch.tensor([position]))
        logits = model.get_output_embeddings()(model.base_model.norm(x))
        assert torch.allclose(logits, expected[position], atol=1e-4)
        assert all(bool(layer.keys[0, :, position].any()) for layer in work.layers)
        assert not any(bool(layer.keys[0, :, position + 1 :].any()) for layer in work.layers)


def test_what_is_no_such_model_is_told(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "layers.0.self_attn.q_proj has activations='int4', which are not int8"
    assert one_launch.obstacle(packed(recipe=Recipe("6:8", activations="int4"))[0]) == told
    model = packed()[0]
    decoder = one_launch.decoder_of(model, Sequences(model, 1, 16).layers)
    assert one_launch.refusal(decoder) is not None  # there is no GPU, or the model is not on it
    monkeypatch.setenv("SPARSE_BITNET_BACKEND", "gpu_triton")
    assert one_launch.refusal(decoder) == "SPARSE_BITNET_BACKEND=gpu_triton asks for another kernel"
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 136)
    assert one_launch.obstacle(model) == "layers.1.mlp.up_proj is not packed"
    model.config.hidden_act = "gelu"
    assert one_launch.obstacle(model) == "hidden_act 'gelu' is not silu"
