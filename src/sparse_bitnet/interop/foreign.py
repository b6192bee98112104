"""From a checkpoint that this package did not write to a latent one of its own, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from sparse_bitnet.checkpoint.directory import CONFIG, read_json
from sparse_bitnet.checkpoint.loading import open_model, resolve_source
from sparse_bitnet.interop.hf_bitnet_import import is_bitnet, open_bitnet
from sparse_bitnet.nn.one_shot import dense_scales, input_norms, restore_scales, start_from_norms
from sparse_bitnet.nn.stored_settings import LATENT, QUANT_METHOD
from sparse_bitnet.nn.swap import prepare, set_recipe
from sparse_bitnet.recipe import NMPattern, Recipe

AS_IT_CAME = "as it came"
NOT_NEEDED = ["*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*"]  # of what lies in repositories of the Hub


def foreign_directory(source: str) -> Path:
    """The directory of a model, or a Hub id once it is downloaded; ValueError where it is nothing to import."""
    name = resolve_source(source)
    directory = Path(name if Path(name).is_dir() else snapshot_download(name, ignore_patterns=NOT_NEEDED))
    stored = read_json(directory / CONFIG).get("quantization_config")
    if isinstance(stored, dict) and not is_bitnet(directory):
        method = stored.get("quant_method")
        if method == QUANT_METHOD:
            is_latent = stored.get("format") == LATENT
            takers = "`train`, `convert`" if is_latent else "`generate`, `serve`, `export`"
            raise ValueError(f"{source} is a checkpoint of this package: give it to {takers} or `eval` as it is")
        raise ValueError(f"{source} is quantised by {method}: import the checkpoint that it was made from")
    return directory


def import_stages(
    directory: Path,
    recipe: Recipe,
    indivisible: str = "raise",
    calibration: Iterable[Mapping[str, Any]] | None = None,
    device: str = "cpu",
) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yields the one model, fp32 masters, in each state that it goes through, with its name; the last is the import.

    as it came      dense, or ternary where `quant_method` is bitnet
    6:8             the pattern of `recipe` alone, if the model came dense and is to be more than that
    6:8, ternary    `recipe`

    calibration  batches of token ids by which activation-aware scores choose the starting mask; None: magnitudes do

    ValueError where the files or the recipe do not fit.
    """
    dense = NMPattern(recipe.pattern.m, recipe.pattern.m)
    came_ternary = is_bitnet(directory)
    if came_ternary and recipe.values != "ternary":
        raise ValueError(
            f"{directory} has ternary weights, for which values={recipe.values!r} make no sense: use ternary"
        )
    if came_ternary:
        model = open_bitnet(directory, recipe.pattern)
    else:
        model = open_model(str(directory), torch.float32)
        prepare(model, Recipe(dense, values="full", activations="none"), indivisible=indivisible)  # type: ignore[arg-type]
    model = model.to(device).eval()  # type: ignore[arg-type]
    yield AS_IT_CAME, model
    scales = dense_scales(model)
    if calibration is not None:
        start_from_norms(model, input_norms(model, calibration), recipe.pattern)
    pattern_alone = Recipe(recipe.pattern, values="full", activations="none")
    if not came_ternary and recipe != pattern_alone:
        set_recipe(model, pattern_alone)
        yield str(recipe.pattern), model
    set_recipe(model, recipe)
    if calibration is not None and recipe.values == "ternary":
        restore_scales(model, scales)
    yield f"{recipe.pattern}, {recipe.values}", model
