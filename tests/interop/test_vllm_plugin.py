"""The plugin beside a double of vLLM's interface: what a share of a model computes is what our own layers compute."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interop import vllm_double
from sparse_bitnet import PackedLinear, Recipe, SparseBitLinear
from sparse_bitnet.nn.stored_settings import QUANT_METHOD, StoredSettings
from sparse_bitnet.numerics.activation import quantize_activation

PLUGIN = "sparse_bitnet.interop.vllm_plugin"
RECIPES = {
    "i2": Recipe("6:8"), "t5": Recipe("6:8"), "g4": Recipe("2:4"), "g4s3": Recipe("3:4", values="sign"),
}  # fmt: skip
MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, imported beside the double."""
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    for name, module in vllm_double.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_double, "tensor_parallel", {"rank": 0, "size": 1})
    yield import_module(PLUGIN)
    sys.modules.pop(PLUGIN, None)


def config_of(plugin: Any, format: str, **settings: Any) -> Any:
    stored = StoredSettings(RECIPES[format], format, **settings).to_dict()
    config = vllm_double.QUANTIZATION_METHODS[QUANT_METHOD].from_config(stored)
    config.packed_modules_mapping = MAPPING
    return config


def packed(format: str, rows: int, columns: int) -> PackedLinear:
    layer = SparseBitLinear(columns, rows, bias=False, recipe=RECIPES[format])
    torch.nn.init.normal_(layer.weight, std=0.5 + torch.rand(()).item())
    return PackedLinear.from_latent(layer, format)


def load(layer: Any, stored: PackedLinear, *shard: Any) -> None:
    """As a model of vLLM does it: each stored tensor by the loader of the parameter of that name."""
    parameters = dict(layer.named_parameters())
    for name, tensor in stored.state_dict().items():
        parameters[name].weight_loader(parameters[name], tensor, *shard)


def test_vllm_finds_the_plugin(plugin: Any) -> None:
    written = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    found = re.search(r'\[project\.entry-points\."(vllm\.general_plugins)"\]\n(\w+) = "(.+)"', written)
    assert found is not None
    assert EntryPoint(found[2], found[3], found[1]).load() is plugin.register
    plugin.register()
    plugin.register()
    config = vllm_double.QUANTIZATION_METHODS[QUANT_METHOD]
    assert config is plugin.SparseBitNetConfig
    assert config.get_config_filenames() == [] and config.get_min_capability() == 70
    assert config_of(plugin, "i2").get_name() == QUANT_METHOD
    assert torch.bfloat16 in config_of(plugin, "i2").get_supported_act_dtypes()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("format", RECIPES)
def test_fused_projections_keep_their_scales(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, format: str, size: int
) -> None:
    """q, k, v with 4 heads over 2, gate and up, each in `size` shares: their rows together are the layers' own."""
    q, k, v = (packed(format, rows, 160) for rows in (4 * 24, 2 * 24, 2 * 24))
    gate, up = packed(format, 64, 160), packed(format, 64, 160)
    x, found = torch.randn(5, 160), []
    for rank in range(size):
        monkeypatch.setattr(vllm_double, "tensor_parallel", {"rank": rank, "size": size})
        qkv = vllm_double.QKVParallelLinear(
            160, 24, 4, 2, config_of(plugin, format), "model.layers.0.self_attn.qkv_proj"
        )
        mlp = vllm_double.MergedColumnParallelLinear(160, [64, 64], config_of(plugin, format), "mlp.gate_up_proj")
        for shard, stored in zip("qkv", (q, k, v), strict=True):
            load(qkv, stored, shard)
        for number, stored in enumerate((gate, up)):
            load(mlp, stored, number)
        for layer in (qkv, mlp):
            layer.quant_method.process_weights_after_loading(layer)
            assert type(layer.weight) is torch.nn.Parameter and layer.weight.dtype == torch.uint8
        bias = torch.randn(sum(qkv.rows))
        assert torch.equal(qkv(x, bias), qkv(x) + bias)
        found.append((qkv(x).split(qkv.rows, -1), mlp(x).chunk(2, -1)))
    replicas = max(1, size // 2)
    for number, layer in enumerate((q, k, v)):
        shares = [share[number] for share, _ in found[:: replicas if number else 1]]
        assert torch.equal(torch.cat(shares, -1), layer(x))
    for number, layer in enumerate((gate, up)):
        assert torch.equal(torch.cat([share[number] for _, share in found], -1), layer(x))


@pytest.mark.parametrize("format", RECIPES)
def test_columns_are_split_at_borders_of_bytes(plugin: Any, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """Two shares of a row-parallel layer are the two halves of its codes, each with activations of its own scale."""
    stored = packed(format, 40, 320)
    x = torch.randn(3, 320)
    total = torch.zeros(3, 40)
    for rank in range(2):
        monkeypatch.setattr(vllm_double, "tensor_parallel", {"rank": rank, "size": 2})
        layer = vllm_double.RowParallelLinear(320, 40, config_of(plugin, format), "down_proj")
        load(layer, stored)
        layer.quant_method.process_weights_after_loading(layer)
        part = slice(160 * rank, 160 * (rank + 1))
        q, scale = quantize_activation(x[:, part], "int8")
        expected = (q.double() @ stored.codes()[:, part].double().T) * (stored.weight_scale.double() / scale.double())
        torch.testing.assert_close(layer(x[:, part]).double(), expected, rtol=1e-6, atol=1e-6)
        total += layer(x[:, part])
    error = (total - stored(x)).pow(2).mean().sqrt()  # of rounding by halves, not by whole tokens
    assert error < 0.02 * stored(x).std()


@pytest.mark.parametrize(
    ("format", "columns", "size"),
    [("i2", 32, 8), ("i2", 24, 2), ("t5", 32, 2), ("t5", 144, 2), ("g4", 48, 2), ("g4s3", 96, 2), ("g4s3", 24, 2)],
)
def test_a_share_that_cuts_a_group_or_a_byte_is_refused(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, format: str, columns: int, size: int
) -> None:
    monkeypatch.setattr(vllm_double, "tensor_parallel", {"rank": 0, "size": size})
    message = f"down_proj: {columns} columns over {size} GPUs are {columns // size} each, which cuts a group of"
    with pytest.raises(ValueError, match=message):
        vllm_double.RowParallelLinear(columns, 40, config_of(plugin, format), "down_proj")


def test_layers_in_floats_stay_so_and_are_not_fused_with_others(plugin: Any) -> None:
    config = config_of(plugin, "i2", ignore=("lm_head", "a.mlp.gate_proj", "a.mlp.up_proj", "b.q_proj"))
    floats = vllm_double.MergedColumnParallelLinear(16, [8, 8], config, "a.mlp.gate_up_proj")
    assert isinstance(floats.quant_method, vllm_double.UnquantizedLinearMethod)
    other = vllm_double.MergedColumnParallelLinear(16, [8, 8], config, "c.mlp.gate_up_proj")
    assert isinstance(other.quant_method, plugin.SparseBitNetLinearMethod)
    with pytest.raises(ValueError, match=r"b\.qkv_proj: b\.q_proj is not packed and the others are"):
        vllm_double.QKVParallelLinear(16, 8, 2, 2, config, "b.qkv_proj")
    assert config.get_quant_method(torch.nn.Embedding(3, 3), "embed_tokens") is None
    experts = type("FusedMoE", (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match=r"mlp\.experts is a mixture of experts"):
        config.get_quant_method(experts, "mlp.experts")


def test_scales_stay_fp32_in_a_model_of_16_bits(plugin: Any) -> None:
    """vLLM builds its layers with the model's dtype as the default; the scale's value need not fit that."""
    stored = packed("i2", 8, 32)
    stored.weight_scale.fill_(0.1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = vllm_double.RowParallelLinear(32, 8, config_of(plugin, "i2"), "down_proj")
    finally:
        torch.set_default_dtype(torch.float32)
    load(layer, stored)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer.weight_scale, torch.tensor([0.1]))
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16 and torch.equal(layer(x), stored(x))


def test_a_checkpoint_that_cannot_be_served_is_refused(plugin: Any) -> None:
    with pytest.raises(ValueError, match="the checkpoint is latent: `sparse-bitnet convert` packs it"):
        plugin.SparseBitNetConfig.from_config(StoredSettings(Recipe("6:8"), "latent").to_dict())
    with pytest.raises(ValueError, match="qkv_proj is fused in the checkpoint"):
        config_of(plugin, "i2", parts={"model.layers.0.self_attn.qkv_proj": (8, 8, 8)})
    with pytest.raises(ValueError, match="version 9 is unknown"):
        plugin.SparseBitNetConfig.from_config(StoredSettings(Recipe("6:8"), "i2").to_dict() | {"version": 9})


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("weight_scale", None, r"down_proj\.weight_scale is not a positive number"),
        ("weight_scale", lambda t: -t, r"down_proj\.weight_scale is not a positive number"),
        ("weight", None, r"down_proj\.weight is not of format i2"),
        ("weight", lambda t: t | 3, r"down_proj\.weight is not of format i2"),
    ],
)
def test_tensors_that_are_missing_or_damaged_are_named(plugin: Any, name: str, spoil: Any, message: str) -> None:
    layer = vllm_double.RowParallelLinear(32, 8, config_of(plugin, "i2"), "model.layers.0.mlp.down_proj")
    for key, tensor in packed("i2", 8, 32).state_dict().items():
        parameter = getattr(layer, key)
        read: Tensor = tensor if key != name or spoil is None else spoil(tensor)
        if key != name or spoil is not None:
            parameter.weight_loader(parameter, read)
    with pytest.raises(ValueError, match=message):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_the_double_has_the_signatures_of_vllm() -> None:
    for module, members in vllm_double.NAMES.items():
        for member in members:
            real, double = getattr(import_module(module), member), getattr(vllm_double, member)
            for name, function in inspect.getmembers(double, inspect.isfunction):
                if name in ("create_weights", "apply", "process_weights_after_loading") or name.startswith("get_"):
                    ours, theirs = (inspect.signature(one).parameters for one in (function, getattr(real, name)))
                    assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()]
