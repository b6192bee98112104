"""The model and the tokenizer that the settings of a run ask for."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.checkpoint.directory import TOKENIZER_FILES, whole_directory
from sparse_bitnet.checkpoint.loading import open_model, resolve_source
from sparse_bitnet.corpus.documents import TextSource
from sparse_bitnet.corpus.tokenizer import load_tokenizer, train_tokenizer
from sparse_bitnet.nn.layer import PackedLayer
from sparse_bitnet.nn.stored_settings import latent_layers, named_layers
from sparse_bitnet.nn.swap import prepare
from sparse_bitnet.recipe import NMPattern, Recipe
from sparse_bitnet.training.config import RecipeSettings, TrainConfig
from sparse_bitnet.training.presets import PRESETS, preset_config
from sparse_bitnet.training.processes import is_first_process

TOKENIZER = "tokenizer"  # below output_dir
TRAIN = "train"
CHOICE = ("targets", "ignore", "indivisible")  # settings of the recipe that say which layers


def build_tokenizer(
    config: TrainConfig, root: Path, source: TextSource, checkpoint: Path | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of the run in `root`: that of the checkpoint resumed, an existing one, or one trained on `source`.

    The first process comes first, the others read what it has written. ValueError where there is none to be had, or no
    text to train it on.
    """
    if not is_first_process() and (root / TOKENIZER).exists():
        return load_tokenizer(str(root / TOKENIZER))
    wanted = config.tokenizer.source or (TRAIN if config.model.source in PRESETS else config.model.source)
    if checkpoint is not None:
        tokenizer = load_tokenizer(str(_tokenizer_directory(checkpoint)))
    elif wanted == TRAIN:
        tokenizer = train_tokenizer(source.documents(), config.tokenizer.vocab_size, config.tokenizer.sample_bytes)
    else:
        tokenizer = load_tokenizer(wanted)
    with whole_directory(root / TOKENIZER, replace=True) as staging:
        tokenizer.save_pretrained(staging)
    return tokenizer


def _tokenizer_directory(checkpoint: Path) -> Path:
    """Where the tokenizer lies whose ids the weights of `checkpoint` know: in it, or beside it in its run."""
    beside = checkpoint.parent / TOKENIZER
    if any((checkpoint / name).exists() for name in TOKENIZER_FILES):
        return checkpoint
    if not beside.is_dir():
        raise ValueError(f"{checkpoint} holds no tokenizer, and {beside} is missing: copy the one of its run there")
    return beside


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
    prepare_layers(config, model)
    return model


def prepare_layers(config: TrainConfig, model: PreTrainedModel) -> None:
    """Give `model` the trainable layers that the settings ask for, unless it has them.

    ValueError where it has others, or a pattern of the schedule does not divide the rows of one.
    """
    recipe, source = config.recipe.recipe(), config.model.source
    layers = [layer for _, layer in named_layers(model)]
    if any(isinstance(layer, PackedLayer) for layer in layers):
        raise ValueError(f"{source} is packed and cannot be trained: give the latent checkpoint instead")
    if layers:
        if any(replace(layer.recipe, pattern=recipe.pattern) != recipe for layer in layers):
            raise ValueError(
                f"{source} was trained as {layers[0].recipe.key}, the settings ask for {recipe.key}: "
                f"of a recipe only the pattern can change"
            )
        _check_choice(config, model, layers[0].recipe)
    elif config.model.weights != "random" and getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"{source} is quantised already: `sparse-bitnet import` makes a trainable checkpoint of one "
            f"with quant_method bitnet"
        )
    else:
        _choose_layers(config, model, recipe)
    for _, pattern in config.pattern_schedule().stages:
        _check_pattern(pattern, model)


def _choose_layers(config: TrainConfig, model: PreTrainedModel, recipe: Recipe) -> None:
    settings = config.recipe
    prepare(model, recipe, settings.targets, settings.ignore, indivisible=settings.indivisible)
    if settings.targets and not latent_layers(model):
        named = ", ".join(map(repr, settings.targets))
        raise ValueError(f"recipe.targets: {named} matches no layer that can be made ternary")


def _check_choice(config: TrainConfig, model: PreTrainedModel, recipe: Recipe) -> None:
    """ValueError where targets, ignore and indivisible are given and would choose other layers than `model` has."""
    if all(getattr(config.recipe, name) == getattr(RecipeSettings(), name) for name in CHOICE):
        return
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.float32)
    _choose_layers(config, dense, recipe)
    different = sorted(latent_layers(dense).keys() ^ latent_layers(model).keys())
    if different:
        raise ValueError(
            f"{config.model.source} has its sparse ternary layers already, and recipe.{', recipe.'.join(CHOICE)} would "
            f"choose others ({different[0]}): leave them at their defaults, or start from a dense model"
        )


def _check_pattern(pattern: NMPattern, model: PreTrainedModel) -> None:
    """ValueError where the pattern of a stage does not divide the rows of a layer."""
    for name, layer in latent_layers(model).items():
        try:
            pattern.check_width(layer.in_features, name)
        except ValueError as error:
            raise ValueError(
                f"{error}: every stage of the schedule needs an m that divides the rows of all sparse ternary layers"
            ) from error


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
