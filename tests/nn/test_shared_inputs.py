"""Layers that read the same x compute as one what each computes alone, bit for bit, and are saved as they were."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sparse_bitnet import PackedLinear, Recipe, convert, prepare
from sparse_bitnet.nn.fast_weight import fast_weight
from sparse_bitnet.nn.shared_inputs import join, layers_sharing_inputs, share

TOKENS = torch.arange(14).reshape(2, 7)


def language_model(format: str = "i2") -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return convert(prepare(model, Recipe("6:8")), format)


def fuse(model: nn.Module) -> list[tuple[PackedLinear, ...]]:
    """As `accelerate` does on a GPU."""
    groups = list(layers_sharing_inputs(model))
    for group in groups:
        weight = fast_weight(join(group), has_fragments=False)
        share(weight, group, weight.by_part())
    return groups


@pytest.mark.parametrize("format", ["i2", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_model_computes_the_same(format: str, dtype: torch.dtype) -> None:
    model = language_model(format).to(dtype)
    fused = copy.deepcopy(model)
    assert [len(group) for group in fuse(fused)] == [3, 2, 3, 2]
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert torch.equal(fused(TOKENS).logits, expected)
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=False)
        assert torch.equal(compiled(TOKENS).logits, expected)
        assert torch.equal(compiled(TOKENS + 1).logits, model(TOKENS + 1).logits)


def test_one_product_serves_all() -> None:
    model, calls = language_model(), []
    group = next(layers_sharing_inputs(model))
    weight = fast_weight(join(group), has_fragments=False)
    share(lambda x: calls.append(x) or weight(x), group, weight.by_part())
    query, key, value = group
    with torch.no_grad():
        x, other = torch.randn(2, 3, 64)
        expected = {id(one): [layer(one) for layer in language_model().model.layers[0].self_attn.children()][:3]
                    for one in (x, other)}  # fmt: skip
        for one in (x, other):
            for layer, y in zip(group, expected[id(one)], strict=True):
                assert torch.equal(layer(one), y)
        assert len(calls) == 2
        query(x)
        assert torch.equal(key(other), expected[id(other)][1])  # as in cross-attention
        assert torch.equal(value(x), expected[id(x)][2])
        assert torch.equal(value(x), expected[id(x)][2])
        assert len(calls) == 3
        assert value.fast.joint.held is None  # type: ignore[union-attr]


def test_nothing_is_held_twice_and_the_state_is_what_it_was(tmp_path: Path) -> None:
    model = language_model()
    before = copy.deepcopy(model.state_dict())
    group = fuse(model)[0]
    assert len({layer.weight.untyped_storage().data_ptr() for layer in group}) == 1
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(opened(TOKENS).logits, model(TOKENS).logits)
        fused = opened(TOKENS).logits
        model.to(torch.float64).to(torch.float32)  # a cast lets the fusion go
        assert group[0].fast is None
        assert torch.equal(model(TOKENS).logits, fused)


def test_layers_that_differ_are_left_apart() -> None:
    model = language_model()
    attention = model.model.layers[0].self_attn
    attention.k_proj.bias = None
    assert [len(group) for group in layers_sharing_inputs(model)] == [2, 3, 2]
    attention.k_proj = nn.Linear(64, 32)
    assert [len(group) for group in layers_sharing_inputs(model)] == [2, 3, 2]
