"""A packed model as stock transformers reads one with no plugin: `quant_method` bitnet, 2 bits a weight.

transformers unpacks such a weight once, when it loads it, and multiplies in floats: it runs wherever transformers does,
small on disk, not in memory. Activations are rounded to int8 by token there too, so logits agree to float rounding.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.bitnet import VALUES_PER_ITEM, pack_weights

from sparse_bitnet.checkpoint.directory import copy_tokenizer, whole_directory, write_text
from sparse_bitnet.checkpoint.loading import open_model
from sparse_bitnet.nn.layer import PackedLayer
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.stored_settings import named_layers, stored_settings
from sparse_bitnet.nn.swap import convert


def export_hf_bitnet(source: str, output: Path, max_shard_size: str = "5GB") -> int:
    """Write the packed or latent checkpoint `source`, tokenizer included, to the directory `output`; its bytes.

    ValueError for a model without ternary weights, or with layers that stock transformers has no form for.
    """
    model = open_model(source)
    layers = dict(named_layers(model))
    if not layers:
        raise ValueError(f"{source} has no ternary weights: export a checkpoint of `train` or `convert`")
    if not all(isinstance(layer, PackedLayer) for layer in layers.values()):
        model = convert(model)
    linears = {name: _checked(name, layer) for name, layer in named_layers(model)}
    with whole_directory(output) as staging:
        tensors = _tensors(model, linears)
        save_torch_state_dict(tensors, staging, max_shard_size=max_shard_size, metadata={"format": "pt"})
        write_text(staging / "config.json", json.dumps(_config(model), indent=2) + "\n")
        if model.generation_config is not None:
            model.generation_config.save_pretrained(staging)
        copy_tokenizer(source, staging)
    return sum(file.stat().st_size for file in output.iterdir())


def _checked(name: str, layer: object) -> PackedLinear:
    if not isinstance(layer, PackedLinear):
        raise ValueError(f"{name} holds the experts of a mixture: transformers' bitnet has linear layers alone")
    if layer.recipe.activations != "int8":
        raise ValueError(f"{name} has activations={layer.recipe.activations!r}: transformers' bitnet layers have int8")
    if layer.parts:
        raise ValueError(f"{name} has {len(layer.parts)} scales: transformers' bitnet layers have one")
    if layer.out_features % VALUES_PER_ITEM:
        raise ValueError(f"{name} has {layer.out_features} rows: transformers packs {VALUES_PER_ITEM} at a time")
    return layer


def _tensors(model: PreTrainedModel, layers: dict[str, PackedLinear]) -> dict[str, Tensor]:
    """The state dict under the same names; what is tied stands there once."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        layer = layers.get(name.rpartition(".")[0])
        kind = name.rpartition(".")[2]
        if layer is None:
            tensors[name] = tensor
        elif kind == "weight":
            tensors[name] = pack_weights(layer.codes())  # [O / 4, I] uint8
        elif kind == "weight_scale":
            tensors[name] = tensor.to(dtype)
        else:  # AutoBitLinear multiplies its bias by the scale too
            tensors[name] = (tensor.float() / layer.weight_scale).to(dtype)
    if getattr(model.config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    return tensors


def _config(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.to_diff_dict()
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": list(stored_settings(model).ignore),
    }
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(next(model.parameters()).dtype).rpartition(".")[2]
    return config
