"""Where one linear layer holds several matrices: their heights, so that each gets a scale of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparse_bitnet.numerics.ternary import Parts

STACKED_QKV = ("qkv_proj", "Wqkv")  # Phi-3, MPT, DBRX: [q; k; v]
INTERLEAVED_QKV = ("query_key_value",)  # GPT-NeoX, BLOOM, Persimmon: q, k, v of head 0, of head 1, ...
STACKED_GATE_UP = ("gate_up_proj",)  # Phi-3, GLM: [gate; up]


def fused_parts(name: str, linear: nn.Linear, config: Any) -> Parts:
    """The parts of the layer called `name` in a Hugging Face model of that `config`, () where it is one matrix.

    ValueError where the layer is known to be fused but its height does not divide as the config says.
    """
    if config is None:
        return ()
    last = name.rpartition(".")[2]
    height = linear.out_features
    if last in STACKED_GATE_UP:
        return _checked((height // 2, height // 2), height, name)
    if last not in STACKED_QKV + INTERLEAVED_QKV:
        return ()
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:
        raise ValueError(f"{name} fuses q, k and v, but the config has no num_attention_heads: pass parts={{...}}")
    if last in INTERLEAVED_QKV:
        return _checked((height // (3 * heads),) * 3, height, name)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head = height // (heads + 2 * kv_heads)
    return _checked((heads * head, kv_heads * head, kv_heads * head), height, name)


def _checked(parts: Parts, height: int, name: str) -> Parts:
    if 0 in parts or height % sum(parts):
        raise ValueError(f"{name}: {height} rows do not divide into parts of {parts}: pass parts={{...}}")
    return parts
