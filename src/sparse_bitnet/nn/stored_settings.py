"""What a checkpoint says about its layers: the `quantization_config` of config.json, version 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparse_bitnet.formats import choose_format
from sparse_bitnet.nn.experts import Experts
from sparse_bitnet.nn.layer import LatentLayer, PackedLayer
from sparse_bitnet.numerics.ternary import Parts
from sparse_bitnet.recipe import Recipe

QUANT_METHOD = "sparse_bitnet"
VERSION = 1
LATENT = "latent"


@dataclass(frozen=True)
class StoredSettings:
    """Enough to rebuild the layers of a checkpoint before its tensors are read.

    recipe  of every layer
    format  how the weights are stored: `latent` (trainable floats) or the name of a packed format
    ignore  full names of the linear layers that are left as they are
    parts   full name -> parts, of the fused projections only; among them gate and up of the experts in one tensor that
            are exchanged, so that the others are those that stay
    """

    recipe: Recipe
    format: str
    ignore: tuple[str, ...] = ()
    parts: dict[str, Parts] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `quantization_config`."""
        return {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "format": self.format,
            **self.recipe.to_dict(),
            "ignore": list(self.ignore),
            "parts": {name: list(parts) for name, parts in self.parts.items()},
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> StoredSettings:
        """The inverse of `to_dict`; ValueError for a version, setting, pattern or format that is unknown."""
        settings = dict(stored)
        method, version = settings.pop("quant_method", None), settings.pop("version", None)
        if method != QUANT_METHOD:
            raise ValueError(f"quantization_config: quant_method={method!r} is not {QUANT_METHOD!r}")
        if version != VERSION:
            raise ValueError(
                f"quantization_config: version {version!r} is unknown, this package reads version {VERSION}: "
                f"upgrade sparse-bitnet, or save the checkpoint with a matching one"
            )
        try:
            format = settings.pop("format")
            ignore = tuple(settings.pop("ignore"))
            parts = {name: tuple(heights) for name, heights in settings.pop("parts").items()}
            recipe = Recipe.from_dict(settings)
            if format != LATENT:
                choose_format(recipe, format)
        except KeyError as error:
            raise ValueError(f"quantization_config: {error.args[0]!r} is missing") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"quantization_config: {error}") from error
        return cls(recipe, format, ignore, parts)


def named_layers(model: nn.Module) -> Iterator[tuple[str, LatentLayer | PackedLayer]]:
    """The layers of this package in `model`, each once, by their full names; the experts of a mixture have two."""
    for name, module in model.named_modules():
        if isinstance(module, LatentLayer | PackedLayer):
            yield name, module
        elif isinstance(module, Experts):
            yield from ((f"{name}.{weight}", layer) for weight, layer in module.layers.items())


def latent_layers(model: nn.Module) -> dict[str, LatentLayer]:
    """The trainable ones among them."""
    return {name: layer for name, layer in named_layers(model) if isinstance(layer, LatentLayer)}


def stored_settings(model: nn.Module) -> StoredSettings:
    """The settings of the layers in `model`; ValueError where it has none, or they do not agree."""
    layers = dict(named_layers(model))
    if not layers:
        raise ValueError("the model has no sparse ternary layers: call prepare(model, recipe) first")
    kinds = {(layer.recipe, layer_format(layer)) for layer in layers.values()}
    if len(kinds) > 1:
        found = " and ".join(sorted(f"{recipe.key} ({format})" for recipe, format in kinds))
        raise ValueError(f"a checkpoint holds one recipe and one format, the layers have {found}")
    recipe, format = kinds.pop()
    ignore = tuple(name for name, module in model.named_modules() if type(module) is nn.Linear)
    return StoredSettings(recipe, format, ignore, {name: layer.parts for name, layer in layers.items() if layer.parts})


def layer_format(layer: LatentLayer | PackedLayer) -> str:
    return layer.format.name if isinstance(layer, PackedLayer) else LATENT


def record_settings(model: nn.Module) -> None:
    """Write the settings into the config of a Hugging Face model, so that `save_pretrained` stores them."""
    config: Any = getattr(model, "config", None)
    if hasattr(model, "save_pretrained") and config is not None:
        config.quantization_config = stored_settings(model).to_dict()
