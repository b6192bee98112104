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
    model = packed(kind, Recipe(pattern), format="i2")[0]
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
    told = "layers.0.self_attn.q_proj is in the format g4: `accelerate` keeps it in i2 too"
    assert one_launch.obstacle(packed(recipe=Recipe("2:4"))[0]) == told
    told = "layers.0.self_attn.q_proj has activations='int4', which are not int8"
    assert one_launch.obstacle(packed(recipe=Recipe("6:8", activations="int4"))[0]) == told
    model = packed(format="i2")[0]
    assert one_launch.obstacle(model) is None
    assert Sequences(model, 1, 16).step_in_one_launch() == "it writes on one GPU, and the model is on cpu"
    decoder = one_launch.decoder_of(model, Sequences(model, 1, 16).layers)
    assert isinstance(one_launch.step_of(decoder), str)  # there is no GPU, or the model is not on it
    monkeypatch.setenv("SPARSE_BITNET_BACKEND", "gpu_triton")
    assert one_launch.step_of(decoder) == "SPARSE_BITNET_BACKEND asks for a certain kernel"
    model.model.layers[0].self_attn.k_proj.parts = (16, 16)
    assert one_launch.obstacle(model) == "layers.0.self_attn.k_proj is several matrices in one"
    model.model.layers[0].self_attn.k_proj.parts = ()
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 136)
    assert one_launch.obstacle(model) == "layers.1.mlp.up_proj is not packed"
    model.config.hidden_act = "gelu"
    assert one_launch.obstacle(model) == "hidden_act 'gelu' is not silu"
