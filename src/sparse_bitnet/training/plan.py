"""What a run would do, told without doing it."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_bitnet.checkpoint.loading import resolve_source
from sparse_bitnet.nn.loading import exchange_for_loading
from sparse_bitnet.nn.stored_settings import StoredSettings, named_layers
from sparse_bitnet.training.config import TrainConfig
from sparse_bitnet.training.model import prepare_layers
from sparse_bitnet.training.presets import PRESETS, preset_config

BYTES_A_PARAMETER = 16  # fp32 weight, gradient and the two moments of AdamW


def describe_plan(config: TrainConfig) -> str:
    """The resolved settings, the parameters and the memory that they take besides activations; nothing is allocated."""
    if config.model.source in PRESETS:
        shape = preset_config(config.model.source, config.tokenizer.vocab_size, None)
    else:
        shape = AutoConfig.from_pretrained(resolve_source(config.model.source))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    if config.model.weights != "random" and getattr(shape, "quantization_config", None) is not None:
        exchange_for_loading(model, StoredSettings.from_dict(shape.quantization_config))
    prepare_layers(config, model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ternary = sum(layer.weight.numel() for _, layer in named_layers(model))
    training = config.training
    tokens = training.steps * training.batch_size * training.gradient_accumulation * training.block_size
    holder = "a process" if training.sharding == "none" else "split over the processes"
    return (
        f"{config.to_yaml()}\n"
        f"parameters      {parameters:,}, of which {ternary:,} in sparse ternary layers\n"
        f"tokens          {tokens:,} on each process, {tokens / parameters:.3g} a parameter\n"
        f"memory          {parameters * BYTES_A_PARAMETER / 2**30:.2f} GiB {holder} for weights, gradients and AdamW, "
        f"and the activations on top"
    )
