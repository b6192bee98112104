"""The model and the tokenizer that the settings of a run ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.checkpoint.directory import whole_directory
from sparse_bitnet.checkpoint.loading import open_model, resolve_source
from sparse_bitnet.corpus.documents import TextSource
from sparse_bitnet.corpus.tokenizer import load_tokenizer, train_tokenizer
from sparse_bitnet.nn.layer import PackedLayer
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.nn.swap import prepare
from sparse_bitnet.training.config import TrainConfig
from sparse_bitnet.training.presets import PRESETS, preset_config

TOKENIZER = "tokenizer"  # below output_dir
TRAIN = "train"


def build_tokenizer(config: TrainConfig, root: Path, source: TextSource, resumed: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of the run in `root`: its own if resumed, an existing one, or one trained on `source`.

    ValueError where there is none to be had, or no text to train it on.
    """
    if resumed and (root / TOKENIZER).exists():
        return load_tokenizer(str(root / TOKENIZER))
    wanted = config.tokenizer.source or (TRAIN if config.model.source in PRESETS else config.model.source)
    if wanted == TRAIN:
        tokenizer = train_tokenizer(source.documents(), config.tokenizer.vocab_size, config.tokenizer.sample_bytes)
    else:
        tokenizer = load_tokenizer(wanted)
    with whole_directory(root / TOKENIZER, replace=True) as staging:
        tokenizer.save_pretrained(staging)
    return tokenizer


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of the run, fp32 masters, its linear layers prepared.

    A preset or `weights: random` starts from random weights (the caller seeds), a dense or latent checkpoint goes on.
    ValueError where it is packed, the vocabulary does not fit, or a block is longer than its context.
    """
    model = _load(config, tokenizer)
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} entries, the model {vocabulary:,}: set tokenizer.source to the "
            f"model's own, or model.weights=random"
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and config.training.block_size > context:
        raise ValueError(f"training.block_size={config.training.block_size} is beyond the model's context of {context}")
    recipe = config.recipe.recipe()
    layers = [layer for _, layer in named_layers(model)]
    if any(isinstance(layer, PackedLayer) for layer in layers):
        raise ValueError(f"{config.model.source} is packed and cannot be trained: give the latent checkpoint instead")
    if layers:
        if any(replace(layer.recipe, pattern=recipe.pattern) != recipe for layer in layers):
            raise ValueError(
                f"{config.model.source} was trained as {layers[0].recipe.key}, the settings ask for {recipe.key}: "
                f"of a recipe only the pattern can change"
            )
        return model
    if config.model.weights != "random" and getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"{config.model.source} is quantised already: `sparse-bitnet import` makes a trainable checkpoint of one "
            f"with quant_method bitnet"
        )
    settings = config.recipe
    prepare(model, recipe, settings.targets, settings.ignore, indivisible=settings.indivisible)
    return model


def _load(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    source = config.model.source
    if source in PRESETS:
        end: Any = tokenizer.eos_token_id
        shape = preset_config(source, len(tokenizer), end)
        return AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    if config.model.weights == "random":
        shape = AutoConfig.from_pretrained(resolve_source(source))
        shape.vocab_size = max(shape.vocab_size, len(tokenizer))
        return AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    return open_model(source, torch.float32)
