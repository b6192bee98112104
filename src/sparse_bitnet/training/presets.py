"""Model shapes by name; all are of the Qwen2 type, random weights, vocabulary from the tokenizer."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config

VOCABULARY_MULTIPLE = 64  # keeps the rows of embedding and head aligned


def _shape(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, context: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "max_position_embeddings": context,
    }


PRESETS = {
    "tiny": _shape(192, 4, 6, 2, 512, 2048),
    "qwen2.5-0.5b": _shape(896, 24, 14, 2, 4864, 32768),
    "qwen2.5-1.5b": _shape(1536, 28, 12, 2, 8960, 32768),
    "qwen2.5-3b": _shape(2048, 36, 16, 2, 11008, 32768),
}


def preset_config(name: str, vocabulary: int, end_of_text: int | None) -> Qwen2Config:
    """The config of a preset for a tokenizer of that many entries; embedding and head are tied, as in Qwen2.5.

    ValueError for a name that is none.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown: choose from {', '.join(PRESETS)}")
    return Qwen2Config(
        **PRESETS[name],
        vocab_size=-(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
