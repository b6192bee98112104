"""prepare -> train -> convert: exchange the linear layers of any module for sparse ternary ones, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from sparse_bitnet.nn.experts import (
    WEIGHTS,
    PackedExperts,
    SparseBitExperts,
    experts_in_one_tensor,
    experts_obstacle,
)
from sparse_bitnet.nn.fused_projections import fused_parts
from sparse_bitnet.nn.layer import PackedLayer
from sparse_bitnet.nn.layer_names import matches, matches_any
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.nn.stored_settings import latent_layers, named_layers, record_settings
from sparse_bitnet.numerics.ternary import Parts, check_parts
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
    """Make the `nn.Linear` layers of `model`, and its experts in one tensor, trainable as sparse ternary ones.

    In place, parameters shared. A mixture's router stays as it is, always; all weights of its experts in one tensor are
    taken or left together.

    targets      which layers, all by default. An entry is a run of whole name segments (`mlp`, `layers.0`,
                 `self_attn.q_proj`) or a glob over the full name (`*.experts.*`)
    ignore       which to leave alone, by the same rule; `lm_head` also means the output embedding by any other name
    parts        for fused projections not known by name: entry -> heights of the matrices (see numerics.ternary)
    indivisible  `skip` leaves a layer whose width the pattern does not divide as it is, with a warning

    Returns `model`. ValueError, with nothing changed, where a width does not divide, experts are held in a way that is
    not known, or the model is already prepared with another recipe. A warning for an entry that matches nothing, and
    for weights to be trained that are not fp32.
    """
    if not isinstance(model, nn.Module) or not isinstance(recipe, Recipe):
        given = f"{type(model).__name__} and {type(recipe).__name__}"
        raise TypeError(f"prepare takes a torch.nn.Module and a Recipe, such as Recipe('6:8'), and not {given}")
    targets = [targets] if isinstance(targets, str) else targets
    ignore = [ignore] if isinstance(ignore, str) else ignore
    _check_not_prepared_otherwise(model, recipe)
    _warn_of_unmatched(model, [*(targets or ()), *(parts or {}), *(entry for entry in ignore if entry != LM_HEAD)])
    layers: dict[str, nn.Module] = {}
    embedding = _embedding(model, "get_input_embeddings")
    for name, linear in _choose_linears(model, targets, ignore).items():
        if linear.weight is getattr(embedding, "weight", None):
            raise ValueError(f"{name} shares its weight with the embedding, which is not ternary: add it to `ignore`")
        if not _fits(recipe, name, linear.in_features, indivisible):
            continue
        given = [tuple(heights) for entry, heights in (parts or {}).items() if matches(name, entry)]
        heights = given[0] if given else fused_parts(name, linear, getattr(model, "config", None))
        check_parts(heights, linear.out_features, name)
        layers[name] = SparseBitLinear.from_linear(linear, recipe, heights)
    for name, experts in _choose_experts(model, targets, ignore).items():
        widths = [experts.get_parameter(weight).shape[-1] for weight in WEIGHTS]
        if all(_fits(recipe, name, width, indivisible) for width in widths):
            layers[name] = SparseBitExperts(experts, recipe)
    if not layers:
        others = ", as they are Conv1D" if any(type(one).__name__ == "Conv1D" for one in model.modules()) else ""
        warnings.warn(f"no nn.Linear layer of the model was chosen{others}: nothing is prepared", stacklevel=2)
        return model
    _warn_of_narrow_masters(layers)
    exchange(model, layers)
    record_settings(model)
    return model


def set_pattern(model: nn.Module, pattern: NMPattern | str) -> None:
    """Give every trainable layer another n:m pattern; ValueError, nothing changed, where a width does not divide."""
    pattern = pattern if isinstance(pattern, NMPattern) else NMPattern.parse(pattern)
    _set_recipes(model, lambda recipe: replace(recipe, pattern=pattern))


def set_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Give every trainable layer another recipe; ValueError, nothing changed, where a width does not divide."""
    _set_recipes(model, lambda before: recipe)


def set_residual(model: nn.Module, share: float) -> None:
    """Have every trainable layer add `share` of its latent weight to its effective weight, in training mode alone.

    For a share that falls to 0 in the course of training (see `training.schedules.ResidualSchedule`); at 0 the layers
    are what they were without. ValueError for a negative share, or where there are no such layers. (arXiv 2601.07892)
    """
    layers = latent_layers(model).values()
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
            layer.residual = found[device] = torch.tensor(share, dtype=torch.float32, device=device)


def convert(model: Model, format: str = "auto") -> Model:
    """Pack the trained layers of `model` for inference, in place, and return it.

    ValueError, with nothing changed, where there is nothing to pack, a weight is not finite, or the values are not
    ternary. `format`: a name of `sparse_bitnet.formats`, or `auto`.
    """
    packed: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, SparseBitLinear):
            packed[name] = PackedLinear.from_latent(module, format, name)
        elif isinstance(module, SparseBitExperts):
            packed[name] = PackedExperts.from_latent(module, format, name)
    if not packed:
        raise ValueError(NOT_PREPARED)
    exchange(model, packed)
    record_settings(model)
    return model


def exchange(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put each layer at its name, and wherever else the module that it replaces is used."""
    replacement = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    for name, module in list(named_modules(model)):
        if id(module) in replacement:
            if not name:
                raise ValueError("the model is itself one linear layer: use SparseBitLinear.from_linear")
            model.set_submodule(name, replacement[id(module)])


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return model.named_modules(remove_duplicate=False)


def _check_not_prepared_otherwise(model: nn.Module, recipe: Recipe) -> None:
    for _, layer in named_layers(model):
        if isinstance(layer, PackedLayer):
            raise ValueError("the model is packed already, and a checkpoint holds one format: prepare the latent model")
        if layer.recipe != recipe:
            raise ValueError(
                f"the model is already prepared as {layer.recipe.key}: it has one recipe (see set_pattern)"
            )


def _warn_of_unmatched(model: nn.Module, entries: Sequence[str]) -> None:
    names = [name for name, _ in named_modules(model)]
    names += [f"{name}.{weight}" for name, _ in experts_in_one_tensor(model) for weight in WEIGHTS]
    for entry in entries:
        if not any(matches(name, entry) for name in names):
            warnings.warn(f"{entry!r} matches no layer of the model", stacklevel=3)


def _warn_of_narrow_masters(layers: Mapping[str, nn.Module]) -> None:
    trainable = {weight.dtype for layer in layers.values() for weight in layer.parameters() if weight.requires_grad}
    if narrow := trainable & {torch.bfloat16, torch.float16}:
        told = (
            f"weights are in {narrow.pop()}, in which small updates are lost: open the model with dtype=torch.float32"
        )
        warnings.warn(told, stacklevel=3)


def _set_recipes(model: nn.Module, change: Callable[[Recipe], Recipe]) -> None:
    layers = latent_layers(model)
    if not layers:
        raise ValueError(NOT_PREPARED)
    recipes = {name: change(layer.recipe) for name, layer in layers.items()}
    for name, layer in layers.items():
        recipes[name].pattern.check_width(layer.in_features, name)
    for name, layer in layers.items():
        layer.recipe = recipes[name]
        layer.step_read = None  # what was made for this step has the recipe before
    record_settings(model)


def _fits(recipe: Recipe, name: str, in_features: int, indivisible: str) -> bool:
    """Whether m divides a row of the layer; where it does not: False with a warning for `skip`, else ValueError."""
    if in_features % recipe.pattern.m and indivisible == "skip":
        why = f"in_features={in_features} is not a multiple of m={recipe.pattern.m}"
        warnings.warn(f"{name} is left as it is: {why}", stacklevel=3)
        return False
    recipe.pattern.check_width(in_features, name)
    return True


def _choose_linears(model: nn.Module, targets: Sequence[str] | None, ignore: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that `prepare` is to exchange, by name; subclasses of `nn.Linear` do things of their own."""
    head = _embedding(model, "get_output_embeddings") if LM_HEAD in ignore else None
    return {
        name: module
        for name, module in named_modules(model)
        if type(module) is nn.Linear
        and (targets is None or matches_any(name, targets))
        and not (matches_any(name, ignore) or module is head or _is_router(name, model))
    }


def _choose_experts(model: nn.Module, targets: Sequence[str] | None, ignore: Sequence[str]) -> dict[str, nn.Module]:
    """The experts in one tensor that `prepare` is to exchange, by name; an entry that means one weight means both."""
    chosen = {}
    for name, experts in experts_in_one_tensor(model):
        names = [name, *(f"{name}.{weight}" for weight in WEIGHTS)]
        wanted = targets is None or any(matches_any(one, targets) for one in names)
        if not wanted or any(matches_any(one, ignore) for one in names):
            continue
        why = experts_obstacle(experts)
        if why is not None:
            raise ValueError(
                f"{name}: experts in one tensor, held in a way that is not known ({why}): add {name!r} or a "
                f"glob to `ignore` to leave them as they are"
            )
        chosen[name] = experts
    return chosen


def _is_router(name: str, model: nn.Module) -> bool:
    """Whether the layer chooses or weighs the experts of a mixture."""
    config: Any = getattr(model, "config", None)
    has_experts = hasattr(config, "to_dict") and any("experts" in setting for setting in config.to_dict())
    return has_experts and bool(ROUTER_SEGMENTS & set(name.split(".")))


def _embedding(model: nn.Module, getter: str) -> nn.Module | None:
    """What the method of that name gives, where the model has it."""
    return getattr(model, getter)() if hasattr(model, getter) else None
