"""Where one linear layer holds several matrices: their heights, so that each gets a scale of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparse_bitnet.numerics.ternary import Parts, check_parts

FUSED_QKV = ("qkv_proj", "Wqkv", "query_key_value")
FUSED_GATE_UP = ("gate_up_proj",)  # [gate; up] wherever it is used

# The layout of q, k and v by `model_type` of the config, as the forward pass of the model cuts them apart.
STACKED = ("phi3", "phi4_multimodal", "mpt", "dbrx", "modernbert")  # [q; k; v]
HEAD_BY_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "minimax")  # q, k, v of head 0, of head 1, ...
FOUR_BLOCKS = ("codegen",)  # [q; v; k] four times, for four TPU cores


def fused_parts(name: str, linear: nn.Linear, config: Any) -> Parts:
    """The parts of the layer called `name` in a Hugging Face model of that `config`, () where it is one matrix.

    ValueError where the name says that q, k and v are fused but not the model how, or the height does not divide.
    """
    last, height = name.rpartition(".")[2], linear.out_features
    if config is None or last not in FUSED_QKV + FUSED_GATE_UP:
        return ()
    if last in FUSED_GATE_UP:
        return _checked((height // 2, height // 2), height, name)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    model_type, heads = getattr(text, "model_type", None), getattr(text, "num_attention_heads", 0)
    if model_type in FOUR_BLOCKS:
        return _checked((height // 12,) * 3, height, name)
    if model_type in HEAD_BY_HEAD and heads:
        return _checked((height // (3 * heads),) * 3, height, name)
    if model_type in STACKED and heads:
        attention = getattr(text, "attn_config", text)  # DBRX keeps its key-value heads there
        kv_heads = getattr(attention, "kv_n_heads", None) or getattr(text, "num_key_value_heads", None) or heads
        head = height // (heads + 2 * kv_heads)
        return _checked((heads * head, kv_heads * head, kv_heads * head), height, name)
    raise ValueError(
        f"{name} fuses q, k and v in a way that is not known for model_type={model_type!r}: "
        f"pass parts={{{last!r}: (heights, ...)}}, or () for one scale"
    )


def _checked(parts: Parts, height: int, name: str) -> Parts:
    try:
        check_parts(parts, height, name)
    except ValueError as error:
        raise ValueError(f"{error}: pass parts={{...}}") from None
    return parts
