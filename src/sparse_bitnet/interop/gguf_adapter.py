"""A LoRA adapter as a GGUF file, which llama.cpp adds to a base model while it runs (`--lora`): the base stays ternary.

Shapes: O out_features, I in_features, R rank of the adapter.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from transformers import AutoConfig

from sparse_bitnet.checkpoint.directory import stored_tensor_names, whole_file
from sparse_bitnet.interop.gguf import ARCHITECTURES, rows_as_llama

WEIGHTS = "adapter_model.safetensors"
BEYOND = (  # settings that llama.cpp has no word for
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "alora_invocation_tokens", "use_qalora",
    "layer_replication",
)  # fmt: skip
PREFIX, SUFFIXES = "base_model.model.", {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}


def export_gguf_adapter(adapter: Path | str, base: str, output: Path) -> int:
    """Write the adapter that PEFT saved in `adapter`, of the model directory `base`, to the file `output`; its bytes.

    ValueError for what is no plain LoRA adapter of linear layers that llama.cpp's architecture knows.
    """
    adapter, config = Path(adapter), _plain_lora(Path(adapter))
    if output.exists():
        raise ValueError(f"{output} exists: remove it or choose another name")
    model: Any = AutoConfig.from_pretrained(base)
    if model.model_type not in ARCHITECTURES:
        raise ValueError(f"{base}: model_type {model.model_type} is not one that can be exported")
    architecture = ARCHITECTURES[model.model_type]
    names = gguf.get_tensor_name_map(architecture, model.num_hidden_layers)
    stored_tensor_names([adapter / WEIGHTS])  # a damaged file is told in one line
    with whole_file(output) as staging:
        writer = gguf.GGUFWriter(staging, gguf.MODEL_ARCH_NAMES[architecture])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _alpha(config))
        for name, tensor in load_file(adapter / WEIGHTS).items():
            layer, kind = _split(name)
            target = names.get_name(f"{layer}.weight", (".weight",))
            if target is None:
                raise ValueError(
                    f"{name} has no place in llama.cpp's {model.model_type}: leave its layer without adapter"
                )
            order = rows_as_llama(model, layer) if kind == "lora_b" and model.model_type == "llama" else None
            matrix = tensor.float() if order is None else tensor.float()[order]  # A [R, I], B [O, R]
            writer.add_tensor(f"{target}.{kind}", matrix.numpy().astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return output.stat().st_size


def _plain_lora(adapter: Path) -> LoraConfig:
    """The settings of the adapter; ValueError where llama.cpp has no word for one of them."""
    if not (adapter / WEIGHTS).exists():
        raise ValueError(f"{adapter} holds no {WEIGHTS}: give the directory that PEFT's save_pretrained wrote")
    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{adapter} is a {config.peft_type} adapter: llama.cpp takes LoRA only")
    beyond = [name for name in BEYOND if getattr(config, name, None)]
    if beyond:
        raise ValueError(f"{adapter} uses {beyond[0]}, which llama.cpp's adapters do not have")
    return config


def _alpha(config: LoraConfig) -> float:
    """What llama.cpp divides by the rank; with `use_rslora` PEFT divides by its root."""
    return config.lora_alpha * (math.sqrt(config.r) if config.use_rslora else 1)


def _split(name: str) -> tuple[str, str]:
    """Layer and `lora_a` or `lora_b`, of PEFT's name of a tensor."""
    for suffix, kind in SUFFIXES.items():
        if name.startswith(PREFIX) and name.endswith(f".{suffix}"):
            return name[len(PREFIX) : -len(suffix) - 1], kind
    raise ValueError(f"{name} is no LoRA matrix of a linear layer: llama.cpp has no place for it")
