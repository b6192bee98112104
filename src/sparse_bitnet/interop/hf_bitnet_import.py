"""Checkpoints with `quant_method: bitnet`, such as microsoft/bitnet-b1.58-2B-4T, as models of this package.

They come in three forms (transformers.integrations.bitnet); activations are rounded to int8 by token in all of them:

    online                   float masters, made ternary in every forward pass, as here; the way to train on
    offline, bitlinear       codes, 4 rows a byte, and weight_scale, by which products are divided: 1 / mean |W|
    offline, autobitlinear   codes, 4 rows a byte or a float each, and weight_scale, by which they are multiplied

Codes hold no order among weights of the same code: their latent weights are as in `numerics.latent.latent_of_codes`.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import BitNetQuantConfig

from sparse_bitnet.checkpoint.directory import CONFIG, GENERATION_CONFIG, check_directory, read_json, weight_files
from sparse_bitnet.nn.swap import prepare
from sparse_bitnet.numerics.latent import latent_of_codes
from sparse_bitnet.recipe import NMPattern, Recipe

BITNET = "bitnet"
ROWS_A_BYTE = 4
WEIGHT, WEIGHT_SCALE, BIAS = ".weight", ".weight_scale", ".bias"


def is_bitnet(directory: Path) -> bool:
    """Whether the model in `directory` says that its `quant_method` is bitnet."""
    stored = read_json(directory / CONFIG).get("quantization_config")
    return isinstance(stored, dict) and stored.get("quant_method") == BITNET


def open_bitnet(directory: Path, pattern: NMPattern) -> PreTrainedModel:
    """The model as it came: trainable, fp32 masters, ternary with int8 activations, of each m of `pattern` all kept.

    ValueError where files are damaged, tensors missing, or layers of a kind that this package has not.
    """
    check_directory(directory)
    config: Any = AutoConfig.from_pretrained(directory)
    settings: Any = BitNetQuantConfig.from_dict(config.quantization_config)
    del config.quantization_config
    if settings.use_rms_norm:
        raise ValueError(f"{directory}: use_rms_norm puts a norm into each linear layer, which the layers here lack")
    state = {name: tensor for file in weight_files(directory) for name, tensor in load_file(file).items()}
    ternary = {name.removesuffix(WEIGHT_SCALE) for name in state if name.endswith(WEIGHT_SCALE)}
    for layer in sorted(ternary):
        _restore(state, layer, divides=settings.linear_class == "bitlinear")
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))
    model, report = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ValueError(f"{directory}: tensor {min(report['missing_keys'])} is missing: the checkpoint is incomplete")
    if (directory / GENERATION_CONFIG).exists():  # which from_pretrained reads by a path alone
        model.generation_config = GenerationConfig.from_pretrained(directory)
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    if settings.quantization_mode == "online":
        skipped = HfQuantizer.get_modules_to_not_convert(model, settings.modules_to_not_convert)
        dense = [name for name in linears if not should_convert_module(name, skipped)]
    else:
        dense = [name for name in linears if name not in ternary]
    dense_pattern = NMPattern(pattern.m, pattern.m)
    return prepare(model, Recipe(dense_pattern, activations="int8"), ignore=dense)


def _restore(state: dict[str, Tensor], layer: str, divides: bool) -> None:
    """Put the latent weight in the place of the codes of `layer`, and a bias that is not scaled."""
    if layer + WEIGHT not in state:
        raise ValueError(f"tensor {layer}{WEIGHT} is missing: the checkpoint is incomplete, copy it again")
    stored, factor = state[layer + WEIGHT], float(state.pop(layer + WEIGHT_SCALE).float())
    if not 0 < factor < float("inf"):
        raise ValueError(f"{layer}{WEIGHT_SCALE} is {factor}: the checkpoint is damaged")
    scale = float(torch.tensor(1 / factor if divides else factor, dtype=torch.float32))
    codes = unpack_rows(stored) if stored.dtype == torch.uint8 else stored
    if bool(((codes != 0) & (codes.abs() != 1)).any()):
        raise ValueError(f"{layer}{WEIGHT} holds other values than -1, 0 and 1: the checkpoint is damaged")
    state[layer + WEIGHT] = latent_of_codes(codes.to(torch.int8), scale)
    if layer + BIAS in state and not divides:  # autobitlinear multiplies its bias too
        state[layer + BIAS] = state[layer + BIAS].float() * scale


def unpack_rows(packed: Tensor) -> Tensor:
    """[O / 4, I] uint8 -> codes [O, I] int8: row r is in byte row r % (O / 4), the first quarter in the lowest bits."""
    quarters = [packed >> 2 * quarter & 3 for quarter in range(ROWS_A_BYTE)]
    return torch.cat(quarters).to(torch.int8) - 1
