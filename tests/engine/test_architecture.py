"""What the engine takes on, and the sentence where it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sparse_bitnet import Recipe
from sparse_bitnet.engine.architecture import end_tokens, obstacle
from sparse_bitnet.engine.rotary import Rotary
from sparse_bitnet.kernels.dispatch import FORCE_VARIABLE
from sparse_bitnet.kernels.packed_linear import NATIVE, OPERATOR

Packed = Callable[..., tuple[PreTrainedModel, Path]]
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "linear", "factor": 8.0}, LLAMA3, YARN,
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}, YARN | {"attention_factor": 1.5},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}, YARN | {"factor": 1.0},
    ],
)  # fmt: skip
@pytest.mark.parametrize("base", [10_000.0, 1e6])
def test_frequencies_are_those_of_transformers(settings: dict[str, Any], base: float) -> None:
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=16384,
        rope_parameters=settings | {"rope_theta": base},
    )  # fmt: skip
    expected, factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config)
    found, found_factor = Rotary.from_config(config.to_dict(), 128).frequencies()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found_factor == pytest.approx(factor, rel=1e-12)


def test_older_checkpoints_name_their_scaling_otherwise() -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_type"} | {"type": "llama3"}
    older = Rotary.from_config({"rope_theta": 5e5, "rope_scaling": scaling}, 64)
    newer = Rotary.from_config({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 64)
    assert torch.equal(older.frequencies()[0], newer.frequencies()[0])
    assert torch.equal(
        Rotary.from_config({"rope_theta": 5e5}, 64).frequencies()[0],
        1 / 5e5 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64),
    )


@pytest.mark.parametrize("factor", [None, 0, -2.0, "8", True, float("inf")])
def test_a_scaling_without_its_numbers_is_refused(factor: object) -> None:
    rotary = Rotary.from_config({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": factor}}, 64)
    with pytest.raises(ValueError, match=r"factor=.* of rope_parameters is no positive number"):
        rotary.frequencies()


def change(directory: Path, **fields: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is none of qwen2, qwen3, llama"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type 'longrope' is none of default"),
        ({"partial_rotary_factor": 0.5}, "rope_type 'partial' is none of default"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not silu"),
        ({"use_sliding_window": True}, "the model has sliding attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "the model has sliding attention"),
        ({"quantization_config": None}, "the model is not packed: `sparse-bitnet convert` packs one"),
        ({"hidden_size": 2**20}, "in_features=1048576 is beyond 131072"),
    ],
)
def test_another_model_is_left_to_transformers(packed: Packed, fields: dict[str, Any], reason: str) -> None:
    _, directory = packed()
    assert obstacle(str(directory)) == OPERATOR.obstacle(NATIVE)
    change(directory, **fields)
    assert reason in str(obstacle(str(directory)))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"format": "latent"}, "the checkpoint is latent: `sparse-bitnet convert` packs it"),
        ({"activations": "none"}, "activations='none' are no integers"),
        ({"ignore": ["lm_head", "model.layers.1.mlp.up_proj"]}, "model.layers.1.mlp.up_proj is not packed"),
        ({"parts": {"model.layers.0.mlp.up_proj": [8, 8]}}, "model.layers.0.mlp.up_proj is a fused projection"),
    ],
)
def test_layers_that_are_not_all_packed_are_left_to_transformers(
    packed: Packed, fields: dict[str, Any], reason: str
) -> None:
    _, directory = packed()
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    change(directory, quantization_config=settings | fields)
    assert reason in str(obstacle(str(directory)))


def test_a_forced_backend_and_a_package_without_kernels_are_told(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, directory = packed()
    assert obstacle("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B is not a directory"
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    assert obstacle(str(directory)) == "SPARSE_BITNET_BACKEND=reference asks for another kernel"
    monkeypatch.setenv(FORCE_VARIABLE, "abacus")
    with pytest.raises(ValueError, match="packed_linear has no such backend"):
        obstacle(str(directory))
    monkeypatch.delenv(FORCE_VARIABLE)
    monkeypatch.setattr(type(OPERATOR), "obstacle", lambda self, backend: "needs a compiler")
    assert obstacle(str(directory)) == "needs a compiler"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size='64' is no number from 1 to 2147483647"),
        ({"hidden_size": 0}, "hidden_size=0 is no number"),
        ({"vocab_size": 2**40}, "vocab_size=1099511627776 is no number"),
        ({"num_attention_heads": True}, "num_attention_heads=True is no number"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06 is no number between 0 and 1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' is neither true nor false"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] is not an object"),
        ({"layer_types": 7}, "config.json"),
    ],
)
def test_a_damaged_config_is_one_line(packed: Packed, fields: dict[str, Any], message: str) -> None:
    _, directory = packed()
    change(directory, **fields)
    with pytest.raises(ValueError, match=message):
        obstacle(str(directory))


def test_the_tokens_that_end_a_text(packed: Packed) -> None:
    _, directory = packed()
    generation = directory / "generation_config.json"
    assert end_tokens(directory) == {0}
    generation.write_text('{"eos_token_id": [3, 5]}')
    assert end_tokens(directory) == {3, 5}
    generation.unlink()
    change(directory, eos_token_id=9)
    assert end_tokens(directory) == {9}
    change(directory, eos_token_id=None)
    assert end_tokens(directory) == set()
    change(directory, eos_token_id="</s>")
    with pytest.raises(ValueError, match="neither a token nor a list"):
        end_tokens(directory)


def test_the_engine_does_without_transformers(packed: Packed) -> None:
    if OPERATOR.obstacle(NATIVE):
        pytest.skip("the native kernels are not built")
    _, directory = packed(recipe=Recipe("2:4"))
    code = f"from sparse_bitnet.engine.decoder import Decoder; Decoder({str(directory)!r}).logits([1]); import sys; "
    code += "print('transformers' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
