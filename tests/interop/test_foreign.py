"""Other people's checkpoints: BitNet in its three forms with the logits of stock transformers, and dense ones.

The packed files are written here by transformers' own packing, not by this package's exporter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitNetConfig, PreTrainedModel
from transformers.integrations.bitnet import pack_weights

from sparse_bitnet import Recipe, convert, prepare
from sparse_bitnet.interop.foreign import foreign_directory, import_stages
from sparse_bitnet.interop.hf_bitnet import export_hf_bitnet
from sparse_bitnet.nn.layer import PackedLayer
from sparse_bitnet.nn.stored_settings import named_layers

FORMS = {
    "bitlinear": ("bitlinear", "offline"),
    "autobitlinear": ("autobitlinear", "offline"),
    "masters": ("autobitlinear", "online"),
}
IDS = torch.arange(1, 21).view(1, -1)
READ = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert "sparse_bitnet" not in sys.modules
with torch.no_grad():
    torch.save(model(torch.arange(1, 21).view(1, -1)).logits, sys.argv[2])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


def bitnet_model() -> PreTrainedModel:
    """The architecture of bitnet-b1.58-2B-4T, tiny; its weights are drawn wide, so that the layers matter."""
    torch.manual_seed(0)
    config = BitNetConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def write(
    model: PreTrainedModel, directory: Path, form: str, dtype: torch.dtype = torch.float32, **settings: object
) -> tuple[Path, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """A checkpoint as Microsoft publishes them, its values those of bf16 whatever `dtype`; codes and scales by layer.

    In bf16, stock transformers can only compute in bf16.
    """
    kind, mode = FORMS[form]
    tensors, expected = {}, {}
    for name, tensor in model.state_dict().items():
        master = tensor.bfloat16().float()
        layer = name.removesuffix(".weight")
        tensors[name] = master.to(dtype)
        if not name.endswith("_proj.weight"):
            continue
        scale = master.double().abs().mean().float()
        codes = (master / scale).round().clamp(-1, 1)
        if mode == "offline":
            factor = (1 / scale if kind == "bitlinear" else scale).bfloat16().float()
            scale = 1 / factor if kind == "bitlinear" else factor
            tensors[name], tensors[f"{layer}.weight_scale"] = pack_weights(codes.clone()), factor.view(1).to(dtype)
        expected[layer] = codes.to(torch.int8), scale.view(1)
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": str(dtype).rpartition(".")[2]}
    stored = {"quant_method": "bitnet", "linear_class": kind, "quantization_mode": mode, "modules_to_not_convert": None}
    config["quantization_config"] = stored | settings
    (directory / "config.json").write_text(json.dumps(config))
    return directory, expected


def stock_logits(directory: Path, file: Path) -> tuple[torch.Tensor, str]:
    """What transformers computes without this package; its layers ask for a compiler that not every machine has."""
    command = [sys.executable, "-c", READ, str(directory), str(file)]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert answer.returncode == 0, answer.stderr
    return torch.load(file), answer.stdout.strip()


@pytest.mark.parametrize("form", FORMS)
def test_bitnet_comes_with_its_codes_its_scales_and_its_logits(form: str, tmp_path: Path) -> None:
    directory, expected = write(bitnet_model(), tmp_path / "theirs", form)
    stages = import_stages(directory, Recipe("6:8"))
    name, model = next(stages)
    assert name == "as it came"
    layers = dict(named_layers(model))
    assert set(layers) == set(expected)
    for layer, (codes, scale) in expected.items():
        found, found_scale = layers[layer].quantize_weight()
        assert torch.equal(found, codes)
        assert torch.equal(found_scale, scale)
    _, other = next(import_stages(write(bitnet_model(), tmp_path / "bf16", form, torch.bfloat16)[0], Recipe("6:8")))
    assert all(torch.equal(layer.weight, layers[name].weight) for name, layer in named_layers(other))
    logits, kind = stock_logits(directory, tmp_path / "logits.pt")
    assert kind == ("BitLinear" if form == "bitlinear" else "AutoBitLinear")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    names = [name for name, _ in stages]
    assert names == ["6:8, ternary"]
    for layer, (codes, scale) in expected.items():
        found, found_scale = layers[layer].quantize_weight()
        assert torch.equal(found[found != 0], codes[found != 0])
        assert torch.equal(found_scale, scale)
        groups = codes.view(codes.shape[0], -1, 8).count_nonzero(dim=-1).clamp(max=6)
        assert torch.equal(found.view(codes.shape[0], -1, 8).count_nonzero(dim=-1), groups)  # zeros go first


def test_an_imported_model_trains_is_saved_and_is_packed(tmp_path: Path) -> None:
    directory, _ = write(bitnet_model(), tmp_path / "theirs", "autobitlinear")
    *_, (_, model) = import_stages(directory, Recipe("6:8"))
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(bool(layer.weight.grad.any()) for _, layer in named_layers(model))
    model.eval().save_pretrained(tmp_path / "ours")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(opened).__name__ == "BitNetForCausalLM"
    latent = opened(IDS).logits.detach()
    packed = convert(opened)(IDS).logits.detach()
    assert float((packed - latent).norm() / latent.norm()) < 5e-3


def test_our_own_export_comes_back(latent_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = convert(latent_model(Recipe("2:4")))  # Qwen2: its query, key and value have a bias
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "packed")
    export_hf_bitnet(str(tmp_path / "packed"), tmp_path / "stock")
    _, opened = next(import_stages(tmp_path / "stock", Recipe("2:4")))
    for name, layer in named_layers(opened):
        codes, scale = layer.quantize_weight()
        other = model.get_submodule(name)
        assert isinstance(other, PackedLayer)
        assert torch.equal(codes, other.codes()) and torch.equal(scale, other.weight_scale)
    with torch.no_grad():
        torch.testing.assert_close(opened(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", [Recipe("6:8"), Recipe("2:4", values="full", activations="none")])
def test_a_dense_checkpoint_goes_through_its_stages(
    dense_model: Callable[..., PreTrainedModel], tmp_path: Path, recipe: Recipe
) -> None:
    dense = dense_model().eval()
    dense.save_pretrained(tmp_path / "dense")
    logits = {name: model(IDS).logits.detach() for name, model in import_stages(tmp_path / "dense", recipe)}
    assert (
        list(logits) == ["as it came", "6:8", "6:8, ternary"]
        if recipe.values == "ternary"
        else ["as it came", "2:4, full"]
    )
    assert torch.equal(logits["as it came"], dense(IDS).logits)
    *_, (_, model) = import_stages(tmp_path / "dense", recipe)
    expected = prepare(dense, recipe)(IDS).logits
    assert torch.equal(list(logits.values())[-1], expected) and torch.equal(model(IDS).logits, expected)


def test_activations_choose_another_mask_and_bitnet_keeps_its_scale(tmp_path: Path) -> None:
    directory, expected = write(bitnet_model(), tmp_path / "theirs", "bitlinear")
    batches = [{"input_ids": torch.randint(0, 320, (2, 32))}]
    *_, (_, aware) = import_stages(directory, Recipe("2:4"), calibration=batches)
    *_, (_, plain) = import_stages(directory, Recipe("2:4"))
    others, differing = dict(named_layers(plain)), 0
    for name, layer in named_layers(aware):
        codes, scale = layer.quantize_weight()
        assert torch.equal(codes[codes != 0], expected[name][0][codes != 0])
        torch.testing.assert_close(scale, expected[name][1], rtol=1e-6, atol=0)
        differing += int((codes != others[name].quantize_weight()[0]).sum())
    assert differing > 1000


def test_what_cannot_be_imported_is_refused_in_a_sentence(
    latent_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    latent_model().save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="is a checkpoint of this package: give it to `train`"):
        foreign_directory(str(tmp_path / "ours"))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised by gptq: import the checkpoint that it was made from"):
        foreign_directory(str(tmp_path / "ours"))
    normed, _ = write(bitnet_model(), tmp_path / "normed", "bitlinear", use_rms_norm=True)
    with pytest.raises(ValueError, match="use_rms_norm puts a norm into each linear layer"):
        next(import_stages(normed, Recipe("6:8")))
    theirs, _ = write(bitnet_model(), tmp_path / "theirs", "bitlinear")
    with pytest.raises(ValueError, match="has ternary weights, for which values='full' make no sense"):
        next(import_stages(theirs, Recipe("6:8", values="full")))


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", 255, "up_proj.weight holds other values than -1, 0 and 1"),
        ("model.layers.1.mlp.up_proj.weight_scale", 0, "up_proj.weight_scale is 0.0: the checkpoint is damaged"),
        ("model.layers.1.mlp.up_proj.weight", None, "up_proj.weight is missing: the checkpoint is incomplete"),
        ("model.norm.weight", None, "model.norm.weight is missing: the checkpoint is incomplete"),
    ],
)
def test_damage_is_told(tmp_path: Path, tensor: str, value: float | None, message: str) -> None:
    directory, _ = write(bitnet_model(), tmp_path / "theirs", "bitlinear")
    tensors = load_file(directory / "model.safetensors")
    if value is None:
        del tensors[tensor]
    else:
        tensors[tensor].fill_(value)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        next(import_stages(directory, Recipe("6:8")))
