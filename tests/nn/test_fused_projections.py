"""`fused_parts` against heights worked out by hand from a config's heads, and its refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from sparse_bitnet.nn.fused_projections import fused_parts

GROUPED = SimpleNamespace(model_type="phi3", num_attention_heads=4, num_key_value_heads=2)
ALL_HEADS = SimpleNamespace(model_type="mpt", num_attention_heads=4)
HEAD_BY_HEAD = SimpleNamespace(model_type="gpt_neox", num_attention_heads=4)
CODEGEN = SimpleNamespace(model_type="codegen", num_attention_heads=16)
DBRX = SimpleNamespace(model_type="dbrx", num_attention_heads=4, attn_config=SimpleNamespace(kv_n_heads=1))


def linear(out_features: int) -> nn.Linear:
    return nn.Linear(8, out_features, bias=False, device="meta")


@pytest.mark.parametrize(
    ("name", "rows", "config", "parts"),
    [
        ("model.layers.0.self_attn.qkv_proj", 128, GROUPED, (64, 32, 32)),
        ("attn.Wqkv", 192, ALL_HEADS, (64, 64, 64)),
        ("attn.Wqkv", 96, DBRX, (64, 16, 16)),
        ("attn.qkv_proj", 192, CODEGEN, (16, 16, 16)),
        ("attention.query_key_value", 192, HEAD_BY_HEAD, (16, 16, 16)),
        ("mlp.gate_up_proj", 256, GROUPED, (128, 128)),
        ("mlp.down_proj", 64, GROUPED, ()),
        ("not_qkv_proj.other", 128, GROUPED, ()),
        ("qkv_proj", 128, None, ()),
    ],
)
def test_parts_follow_the_heads(name: str, rows: int, config: SimpleNamespace | None, parts: tuple[int, ...]) -> None:
    assert fused_parts(name, linear(rows), config) == parts


def test_heads_are_those_of_the_text_model() -> None:
    config = SimpleNamespace(get_text_config=lambda: GROUPED, num_attention_heads=16)
    assert fused_parts("qkv_proj", linear(128), config) == (64, 32, 32)


@pytest.mark.parametrize(
    ("name", "rows", "config"),
    [
        ("a.qkv_proj", 130, GROUPED),
        ("a.qkv_proj", 4, GROUPED),
        ("a.query_key_value", 100, HEAD_BY_HEAD),
        ("a.gate_up_proj", 5, GROUPED),
    ],
)
def test_height_that_does_not_divide_is_refused_by_name(name: str, rows: int, config: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: {rows} rows do not divide into parts of .*: pass parts="):
        fused_parts(name, linear(rows), config)


@pytest.mark.parametrize("config", [SimpleNamespace(), SimpleNamespace(model_type="other", num_attention_heads=4)])
def test_a_fusion_of_an_unknown_model_is_refused_by_name(config: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"^a.qkv_proj fuses q, k and v in a way that is not known for model_type="):
        fused_parts("a.qkv_proj", linear(128), config)
