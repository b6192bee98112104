"""prepare -> train -> convert: exchange the linear layers of any module for sparse ternary ones, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from sparse_bitnet.nn.fused_projections import fused_parts
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.nn.stored_settings import LATENT, StoredSettings, named_layers, record_settings
from sparse_bitnet.numerics.ternary import Parts
from sparse_bitnet.recipe import NMPattern, Recipe

LM_HEAD = "lm_head"
NOT_PREPARED = "the model has no trainable sparse ternary layers: call prepare(model, recipe) first"
ROUTER_SEGMENTS = {"router", "gate", "shared_expert_gate"}

Model = TypeVar("Model", bound=nn.Module)


def prepare(
    model: Model,
    recipe: Recipe,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (LM_HEAD,),
    *,
    parts: Mapping[str, Parts] | None = None,
    indivisible: Literal["raise", "skip"] = "raise",
) -> Model:
    """Make the `nn.Linear` layers of `model` trainable as sparse ternary ones, in place, parameters shared.

    A mixture's router stays as it is, always.

    targets      which layers, all by default. An entry is a run of whole name segments (`mlp`, `layers.0`,
                 `self_attn.q_proj`) or a glob over the full name (`*.experts.*`)
    ignore       which to leave alone, by the same rule; `lm_head` also means the output embedding by any other name
    parts        for fused projections not known by name: entry -> heights of the matrices (see numerics.ternary)
    indivisible  `skip` leaves a layer whose width the pattern does not divide as it is, with a warning

    Returns `model`. ValueError, with nothing changed, where a width does not divide, or the model is already prepared
    with another recipe. A warning for an entry that matches nothing.
    """
    targets = [targets] if isinstance(targets, str) else targets
    ignore = [ignore] if isinstance(ignore, str) else ignore
    _check_not_prepared_otherwise(model, recipe)
    _warn_of_unmatched(model, [*(targets or ()), *(parts or {}), *(entry for entry in ignore if entry != LM_HEAD)])
    layers: dict[str, nn.Module] = {}
    for name, linear in _choose_linears(model, targets, ignore).items():
        if linear.in_features % recipe.pattern.m and indivisible == "skip":
            why = f"in_features={linear.in_features} is not a multiple of m={recipe.pattern.m}"
            warnings.warn(f"{name} is left as it is: {why}", stacklevel=2)
            continue
        recipe.pattern.check_width(linear.in_features, name)
        given = [tuple(heights) for entry, heights in (parts or {}).items() if _matches(name, entry)]
        heights = given[0] if given else fused_parts(name, linear, getattr(model, "config", None))
        if heights and linear.out_features % sum(heights):
            raise ValueError(f"{name}: {linear.out_features} rows do not divide into parts of {heights}")
        layers[name] = SparseBitLinear.from_linear(linear, recipe, heights)
    if not layers:
        warnings.warn("no nn.Linear layer of the model was chosen: nothing is prepared", stacklevel=2)
        return model
    _exchange(model, layers)
    record_settings(model)
    return model


def set_pattern(model: nn.Module, pattern: NMPattern | str) -> None:
    """Give every trainable layer another n:m pattern; ValueError, nothing changed, where a width does not divide."""
    pattern = pattern if isinstance(pattern, NMPattern) else NMPattern.parse(pattern)
    layers = {name: layer for name, layer in named_layers(model) if isinstance(layer, SparseBitLinear)}
    if not layers:
        raise ValueError(NOT_PREPARED)
    for name, layer in layers.items():
        pattern.check_width(layer.in_features, name)
    for layer in layers.values():
        layer.recipe = replace(layer.recipe, pattern=pattern)
        layer.step_version = -1  # what was made for this step has the pattern before
    record_settings(model)


def set_residual(model: nn.Module, share: float) -> None:
    """Have every trainable layer add `share` of its latent weight to its effective weight, in training mode alone.

    For a share that falls to 0 in the course of training (see `training.schedules.ResidualSchedule`); at 0 the layers
    are what they were without. ValueError for a negative share, or where there are no such layers. (arXiv 2601.07892)
    """
    layers = [layer for _, layer in named_layers(model) if isinstance(layer, SparseBitLinear)]
    if not layers:
        raise ValueError(NOT_PREPARED)
    if share < 0:
        raise ValueError(f"residual={share} is negative: it is a share of the latent weight that is added")
    found: dict[torch.device, Tensor] = {}
    for layer in layers:
        device = layer.weight.device
        if share == 0:
            layer.residual = None
        elif device in found:
            layer.residual = found[device]
        elif layer.residual is not None and layer.residual.device == device:
            found[device] = layer.residual.fill_(share)  # in place: compiled code stays as it is
        else:
            layer.residual = found[device] = torch.tensor(share, device=device)


def convert(model: Model, format: str = "auto") -> Model:
    """Pack the trained layers of `model` for inference, in place, and return it.

    ValueError, with nothing changed, where there is nothing to pack, a weight is not finite, or the values are not
    ternary. `format`: a name of `sparse_bitnet.formats`, or `auto`.
    """
    latent = {name: layer for name, layer in named_layers(model) if isinstance(layer, SparseBitLinear)}
    if not latent:
        raise ValueError("the model has no trainable sparse ternary layers to pack: call prepare(model, recipe) first")
    packed = {name: PackedLinear.from_latent(layer, format, name) for name, layer in latent.items()}
    _exchange(model, packed)
    record_settings(model)
    return model


def exchange_for_loading(model: nn.Module, settings: StoredSettings) -> None:
    """Give `model`, whose weights are not read yet, the layers that a checkpoint with `settings` holds.

    A base model may lack the prefix that the stored names carry, so a name also matches its own tail.
    """
    layers: dict[str, nn.Module] = {}
    for name, linear in _named_modules(model):
        if type(linear) is not nn.Linear or any(_same_layer(name, entry) for entry in settings.ignore):
            continue
        parts = next((heights for entry, heights in settings.parts.items() if _same_layer(name, entry)), ())
        settings.recipe.pattern.check_width(linear.in_features, name)
        if settings.format == LATENT:
            layers[name] = SparseBitLinear.from_linear(linear, settings.recipe, parts)
        else:
            layers[name] = PackedLinear(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                linear.weight.device,
                linear.weight.dtype,
                recipe=settings.recipe,
                format=settings.format,
                parts=parts,
            )
    _exchange(model, layers)


def unpack_to_linear(model: nn.Module, dtype: Any) -> None:
    """Give `model` plain `nn.Linear` layers over the effective weights of its packed ones, in `dtype`."""
    layers = {name: layer for name, layer in named_layers(model) if isinstance(layer, PackedLinear)}
    _exchange(model, {name: layer.to_linear(dtype) for name, layer in layers.items()})


def _exchange(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put each layer at its name, and wherever else the module that it replaces is used."""
    replacement = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    for name, module in list(_named_modules(model)):
        if id(module) in replacement:
            if not name:
                raise ValueError("the model is itself one linear layer: use SparseBitLinear.from_linear")
            model.set_submodule(name, replacement[id(module)])


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return model.named_modules(remove_duplicate=False)


def _check_not_prepared_otherwise(model: nn.Module, recipe: Recipe) -> None:
    for _, layer in named_layers(model):
        if isinstance(layer, PackedLinear):
            raise ValueError("the model is packed already, and a checkpoint holds one format: prepare the latent model")
        if layer.recipe != recipe:
            raise ValueError(
                f"the model is already prepared as {layer.recipe.key}: it has one recipe (see set_pattern)"
            )


def _warn_of_unmatched(model: nn.Module, entries: Sequence[str]) -> None:
    """Warn of entries that match nothing, and of experts that are no linear layers and so stay dense."""
    for entry in entries:
        if not any(_matches(name, entry) for name, _ in _named_modules(model)):
            warnings.warn(f"{entry!r} matches no layer of the model", stacklevel=3)
    stacked = [name for name, weight in model.named_parameters() if weight.dim() == 3 and "experts" in name.split(".")]
    if stacked:
        warnings.warn(f"experts in one tensor are left as they are: {stacked[0]}, {len(stacked)} in all", stacklevel=3)


def _choose_linears(model: nn.Module, targets: Sequence[str] | None, ignore: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that `prepare` is to exchange, by name; subclasses of `nn.Linear` do things of their own."""
    head = _output_embedding(model) if LM_HEAD in ignore else None
    return {
        name: module
        for name, module in _named_modules(model)
        if type(module) is nn.Linear
        and (targets is None or _matches_any(name, targets))
        and not (_matches_any(name, ignore) or module is head or _is_router(name, model))
    }


def _is_router(name: str, model: nn.Module) -> bool:
    """Whether the layer chooses or weighs the experts of a mixture."""
    config: Any = getattr(model, "config", None)
    has_experts = hasattr(config, "to_dict") and any("experts" in setting for setting in config.to_dict())
    return has_experts and bool(ROUTER_SEGMENTS & set(name.split(".")))


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def _matches_any(name: str, entries: Sequence[str]) -> bool:
    return any(_matches(name, entry) for entry in entries)


def _matches(name: str, entry: str) -> bool:
    return fnmatchcase(name, entry) or f".{entry}." in f".{name}."


def _same_layer(name: str, stored: str) -> bool:
    return name == stored or stored.endswith(f".{name}") or name.endswith(f".{stored}")
