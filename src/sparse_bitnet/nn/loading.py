"""The layers that a checkpoint holds, and plain ones back: for those who open models, before and after the tensors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from sparse_bitnet.nn.experts import (
    GATE_UP,
    WEIGHTS,
    PackedExperts,
    SparseBitExperts,
    experts_in_one_tensor,
    experts_obstacle,
)
from sparse_bitnet.nn.layer import LatentLayer
from sparse_bitnet.nn.layer_names import same_layer
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.nn.stored_settings import LATENT, StoredSettings
from sparse_bitnet.nn.swap import exchange, named_modules
from sparse_bitnet.numerics.ternary import check_parts


def exchange_for_loading(model: nn.Module, settings: StoredSettings, new: Collection[str] = ()) -> None:
    """Give `model`, whose weights are not read yet, the layers that a checkpoint with `settings` holds.

    A base model may lack the prefix that the stored names carry, so a name also matches its own tail. `new` are names
    of layers that the checkpoint never had, such as another head: they stay as they are.
    """
    layers: dict[str, nn.Module] = {}
    for name, linear in named_modules(model):
        if type(linear) is not nn.Linear or any(same_layer(name, entry) for entry in settings.ignore) or name in new:
            continue
        parts = next((heights for entry, heights in settings.parts.items() if same_layer(name, entry)), ())
        settings.recipe.pattern.check_width(linear.in_features, name)
        check_parts(parts, linear.out_features, name)
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
    for name, experts in experts_in_one_tensor(model):
        if not any(same_layer(f"{name}.{GATE_UP}", entry) for entry in settings.parts):
            continue
        why = experts_obstacle(experts)
        if why is not None:
            raise ValueError(f"{name} cannot hold the experts of the checkpoint: {why}")
        shapes = {weight: experts.get_parameter(weight).shape for weight in WEIGHTS}
        for weight, shape in shapes.items():
            settings.recipe.pattern.check_width(shape[-1], f"{name}.{weight}")
        if settings.format == LATENT:
            layers[name] = SparseBitExperts(experts, settings.recipe)
        else:
            device = experts.get_parameter(GATE_UP).device
            layers[name] = PackedExperts(experts, shapes, settings.recipe, settings.format, device)
    exchange(model, layers)


def unpack_to_linear(model: nn.Module, dtype: Any) -> None:
    """Give `model` plain `nn.Linear` layers, and experts, over the effective weights of its packed ones, in `dtype`.

    ValueError where they are latent.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            layers[name] = module.to_linear(dtype)
        elif isinstance(module, PackedExperts):
            layers[name] = module.to_experts(dtype)
        elif isinstance(module, LatentLayer):
            raise ValueError(f"{name} is latent, and has no effective weight of its own: pack the model with convert()")
    exchange(model, layers)
