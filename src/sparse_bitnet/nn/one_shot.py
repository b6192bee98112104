"""Activation-aware pruning in one shot, as the mask that training starts from.

A weight counts for |W| times the norm of what it multiplies (Wanda, arXiv 2306.11695, equation 1). There each layer is
pruned before the inputs of the next are taken; here all are taken from the model as it is, in one pass over the text.

Shapes: T tokens, O out_features, I in_features, E experts, S rows sorted by expert, H hidden, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_bitnet.nn.experts import DOWN, GATE_UP, SparseBitExperts, mixture, rows_by_expert
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.nn.stored_settings import latent_layers
from sparse_bitnet.numerics.latent import latent_under_mask, with_scale
from sparse_bitnet.numerics.nm_mask import nm_mask
from sparse_bitnet.numerics.ternary import absmean_scale
from sparse_bitnet.recipe import NMPattern


@torch.no_grad()
def input_norms(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Euclidean norm of each input feature over the calibration `batches`, by layer: [I] fp32, [E, I] for experts.

    `model` is prepared, and computes as its recipe says. An expert that no token came to has norms of 1: the magnitudes
    of its weights alone count.
    """
    squares: dict[str, Tensor] = {}

    def observe(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, SparseBitExperts):
            for weight, found in _squares_of_experts(module, *args).items():
                squares[f"{name}.{weight}"] = squares.get(f"{name}.{weight}", 0) + found
        else:
            squares[name] = squares.get(name, 0) + args[0].reshape(-1, args[0].shape[-1]).float().square().sum(0)

    hooks = [
        module.register_forward_pre_hook(partial(observe, name))
        for name, module in model.named_modules()
        if isinstance(module, SparseBitLinear | SparseBitExperts)
    ]
    try:
        for batch in batches:
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found.sqrt().where(found.any(dim=-1, keepdim=True), 1.0) for name, found in squares.items()}


@torch.no_grad()
def start_from_norms(model: nn.Module, norms: Mapping[str, Tensor], pattern: NMPattern) -> None:
    """Change the latent weights of `model` so that `pattern` masks them at first by |W| times their input's norm.

    In place; see `numerics.latent.latent_under_mask` for how. ValueError where a layer has no norms.
    """
    for name, layer in latent_layers(model).items():
        if name not in norms:
            raise ValueError(f"{name} had no input in the calibration text, so that its weights cannot be scored")
        mask = nm_mask(layer.weight.abs().float() * norms[name].unsqueeze(-2), pattern)
        layer.weight.copy_(latent_under_mask(layer.weight, mask, pattern))


@torch.no_grad()
def dense_scales(model: nn.Module) -> dict[str, Tensor]:
    """The absmean scale of each layer, [..., P] fp32."""
    return {name: absmean_scale(layer.weight, layer.parts) for name, layer in latent_layers(model).items()}


@torch.no_grad()
def restore_scales(model: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Let all weights of a layer grow by what those that `start_from_norms` shrank have taken from its scale."""
    for name, layer in latent_layers(model).items():
        layer.weight.copy_(with_scale(layer.weight, scales[name], layer.parts))


def _squares_of_experts(experts: SparseBitExperts, x: Tensor, index: Tensor, share: Tensor) -> dict[str, Tensor]:
    """Sums of the squared inputs of both weights, expert by expert: [E, H] and [E, F]."""
    weights = experts.layers[GATE_UP].effective_weight(x.dtype, training=False)
    found: dict[str, list[Tensor]] = {GATE_UP: [], DOWN: []}

    def run(rows: Tensor, ends: Tensor) -> Tensor:
        for some, weight in zip(rows_by_expert(rows, ends), weights.unbind(), strict=True):
            found[GATE_UP].append(some.float().square().sum(0))
            found[DOWN].append(experts.join(F.linear(some, weight)).float().square().sum(0))
        return rows

    mixture(x, index, share, len(weights), run)
    return {name: torch.stack(sums) for name, sums in found.items()}
