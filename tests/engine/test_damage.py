"""Files that are damaged: a sentence, never a crash."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sparse_bitnet import Recipe

pytest.importorskip("sparse_bitnet._native", reason="the native kernels are not built")

from sparse_bitnet.engine.decoder import Decoder

Packed = Callable[..., tuple[PreTrainedModel, Path]]
ROUNDS = 1500


def decode(directory: Path) -> str | None:
    """What is said when the model in `directory` is opened and writes, None where nothing is wrong."""
    try:
        decoder = Decoder(directory, threads=2)
        list(decoder.generate([[1, 2, 3], [5]], 3))
    except ValueError as error:
        assert str(error), error
        return str(error)
    return None


def test_a_row_of_the_head_with_nan_is_told(packed: Packed) -> None:
    """Whether it is rounded to int8 or read as it is stored."""
    _, directory = packed(tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][200, 3] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for head in ("int8", "stored"):
        with pytest.raises(ValueError, match="the logits are not numbers"):
            list(Decoder(directory, head=head).generate([[1, 2, 3]], 3))


def mutate(data: bytes, generator: random.Random) -> bytes:
    """A few bytes changed, left out, doubled, or the end cut off."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        if not changed:
            return b""
        at = generator.randrange(len(changed))
        match generator.randrange(6):
            case 0:
                changed[at] = generator.randrange(256)
            case 1:
                changed[at] ^= 1 << generator.randrange(8)
            case 2:
                changed[at : at + 1] = b"%d" % generator.choice([0, 1, 2**31, 2**63, 10**30])
            case 3:
                del changed[at : at + generator.randint(1, 8)]
            case 4:
                changed[at:at] = changed[at : at + generator.randint(1, 8)]
            case _:
                changed[at] = generator.choice(b'0123456789-.{}[]",:')
    return bytes(changed[: generator.randint(0, len(changed))] if generator.random() < 0.1 else changed)


def header_length(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("part", ["length", "header", "data", "config"])
def test_mutated_files_give_a_sentence_or_work(packed: Packed, part: str) -> None:
    """Thousands of files in the manner of a fuzzer; each ends in ValueError or in tokens."""
    _, directory = packed("qwen3", Recipe("2:4"), head_dim=8, vocab_size=64, num_hidden_layers=1)
    weights, config = directory / "model.safetensors", directory / "config.json"
    data, settings = weights.read_bytes(), config.read_bytes()
    end = header_length(data)
    generator = random.Random(part)
    sentences = set()
    for _ in range(ROUNDS):
        match part:
            case "config":
                config.write_bytes(mutate(settings, generator))
            case "length":
                weights.write_bytes(mutate(data[:8], generator) + data[8:])
            case "header":
                header = mutate(data[8:end], generator)
                weights.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
            case _:
                weights.write_bytes(data[:end] + mutate(data[end:], generator))
        sentences.add(decode(directory))
    weights.write_bytes(data)
    config.write_bytes(settings)
    assert decode(directory) is None
    assert len(sentences) > 2  # so that the mutations reach something


def test_a_truncated_file_is_refused_at_every_length(packed: Packed) -> None:
    _, directory = packed(num_hidden_layers=1)
    weights = directory / "model.safetensors"
    data = weights.read_bytes()
    for length in [*range(0, 40), *range(40, len(data), 997), len(data) - 1]:
        weights.write_bytes(data[:length])
        assert "model.safetensors cannot be read" in str(decode(directory))


NAME = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{NAME}.weight", None, f"tensor {NAME}.weight is missing"),
        (f"{NAME}.weight", lambda t: t[:-1], f"tensor {NAME}.weight is [63, 34], not [64, 34]"),
        (f"{NAME}.weight", lambda t: t.view(torch.int8), f"tensor {NAME}.weight is not of format i2"),
        (f"{NAME}.weight", lambda t: t | 3, f"tensor {NAME}.weight is not of format i2"),
        (f"{NAME}.weight_scale", lambda t: t * float("nan"), f"tensor {NAME}.weight_scale is not a positive number"),
        (f"{NAME}.weight_scale", lambda t: -t, f"tensor {NAME}.weight_scale is not a positive number"),
        ("model.norm.weight", lambda t: t.double(), "tensor model.norm.weight is torch.float64, not one of"),
        ("model.layers.0.self_attn.k_proj.bias", None, "self_attn.k_proj.bias is missing"),
        ("model.embed_tokens.weight", lambda t: t.flatten(), "tensor model.embed_tokens.weight is [20480], not [320"),
        ("model.norm.weight", lambda t: t * float("nan"), "the logits are not numbers"),
        ("model.embed_tokens.weight", lambda t: t * float("inf"), "the logits are not numbers"),
    ],
)
def test_a_tensor_that_is_wrong_is_named(
    packed: Packed, name: str, change: Callable[[Tensor], Tensor] | None, message: str
) -> None:
    _, directory = packed(tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    said = str(decode(directory))
    assert message in said
    assert "\n" not in said


def test_tensors_at_odd_addresses_are_read(packed: Packed) -> None:
    """safetensors allows any offset; floats that are not aligned are copied."""
    _, directory = packed(tie_word_embeddings=True)
    expected = Decoder(directory).logits([1, 2, 3])
    file = directory / "model.safetensors"
    data = file.read_bytes()
    end = header_length(data)
    header = data[8:end].rstrip(b" ")
    odd = header + b" " * ((2 - len(header)) % 4 + 1)
    file.write_bytes(len(odd).to_bytes(8, "little") + odd + data[end:])
    assert torch.equal(Decoder(directory).logits([1, 2, 3]), expected)


def test_no_memory_for_the_cache_is_a_sentence(packed: Packed) -> None:
    _, directory = packed(max_position_embeddings=2**31 - 1)
    config = json.loads((directory / "config.json").read_text())
    assert config["max_position_embeddings"] == 2**31 - 1
    decoder = Decoder(directory)
    with pytest.raises(ValueError, match=re.escape("there is no memory for keys and values of")):
        next(decoder.generate([[1]], 2**31 - 2))
