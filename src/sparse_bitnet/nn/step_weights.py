"""What the layers of a model multiply with during one optimizer step, made once for all of its micro-batches."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_bitnet.kernels.effective_weight import empty_scale, scale_count, write_effective_weights
from sparse_bitnet.kernels.weight_fragments import empty_fragments, write_fragments
from sparse_bitnet.nn.layer import LatentLayer
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.nn.sparse_forward import Shape, sparse_forward_obstacle
from sparse_bitnet.nn.stored_settings import latent_layers
from sparse_bitnet.numerics.ternary import scale_by_row
from sparse_bitnet.recipe import Recipe

SCRATCH_WEIGHTS = 2**28  # whose codes are made at a time on the way to fragments, a byte each


class StepWeights:
    """Effective weights of all trainable layers of `model`, which keep them from one `refresh` to the next.

    On a GPU a refresh is three launches, whatever the number of layers. Call it before the first micro-batch of every
    optimizer step, and `release` at the end. A layer uses what it was given in training mode alone, where it computes
    in `dtype` (None: that of the weight), and, outside of torch.compile, which cannot look, while its weight is still
    the one that was read; else it reads its weight anew. Costs 2 bytes a weight in bf16, which the backward pass keeps
    in any case. Left out are weights split over processes, which are there for the forward pass only.

    Layers whose shape [O, I] is among `sparse_shapes` get their weight for sparse tensor cores instead, where their
    recipe has such a form and no residual is added (see swap.set_residual): their forward products then run there (see
    sparse_forward.py, whose `sparse_forward_gains` tells where that pays). It takes a quarter of a byte a weight (2:4)
    or three eighths (6:8), four launches for every SCRATCH_WEIGHTS, and as many bytes, or those of the largest layer,
    from one refresh to the next.

    ValueError where the layers do not have one recipe.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None = None, sparse_shapes: Collection[Shape] = ()
    ) -> None:
        self.dtype = dtype
        self.sparse_shapes = sparse_shapes
        self._layers = [layer for layer in latent_layers(model).values() if _is_whole(layer)]
        self._dense: _Batch | None = None
        self._sparse: list[_Batch] = []
        self._arranged: tuple[Recipe, Collection[Shape]] | None = None
        forget = register_optimizer_step_post_hook(partial(_forget, weakref.ref(self)))
        weakref.finalize(self, forget.remove)

    @property
    def shapes(self) -> set[Shape]:
        """Those of the linear layers."""
        linears = (layer for layer in self._layers if isinstance(layer, SparseBitLinear))
        return {(layer.out_features, layer.in_features) for layer in linears}

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the latent weights anew."""
        if not self._layers or self._layers[0].recipe.keeps_weight:
            return self.release()
        recipe = self._layers[0].recipe
        for layer in self._layers:
            if layer.recipe != recipe:
                raise ValueError(f"layers are {recipe.key} and {layer.recipe.key}: give all one, see set_pattern")
        shapes = () if any(layer.residual is not None for layer in self._layers) else self.sparse_shapes
        if self._arranged != (recipe, shapes):
            self._arrange(recipe, shapes)
        if self._dense is not None:
            self._dense.refresh(recipe)
        for batch in self._sparse:
            batch.refresh(recipe)
            batch.pack(recipe)
        for layer in self._layers:
            layer.step_read = layer.weight.data_ptr(), layer.weight._version

    def _arrange(self, recipe: Recipe, shapes: Collection[Shape]) -> None:
        """Room for what the layers are given, anew where pattern or shapes have changed."""
        self.release()
        dense: list[LatentLayer] = []
        batches: list[list[SparseBitLinear]] = []
        weights = 0  # of the last batch
        for layer in self._layers:
            layer.step_dtype = self.dtype or layer.weight.dtype
            shape = layer.out_features, layer.in_features
            has_form = shape in shapes and sparse_forward_obstacle(recipe, shape) is None
            if not has_form or not isinstance(layer, SparseBitLinear):
                layer.step_weight = torch.empty_like(layer.weight, dtype=self.dtype)
                dense.append(layer)
                continue
            layer.step_fragments = empty_fragments(layer.weight, recipe.pattern.m)
            if not batches or weights + layer.weight.numel() > SCRATCH_WEIGHTS:
                batches.append([])
                weights = 0
            batches[-1].append(layer)
            weights += layer.weight.numel()
        if dense:
            self._dense = _Batch(dense, [layer.step_weight for layer in dense if layer.step_weight is not None])
        if batches:
            most = max(sum(layer.weight.numel() for layer in batch) for batch in batches)
            scratch = torch.empty(most, dtype=torch.int8, device=batches[0][0].weight.device)
            self._sparse = [_Batch(batch, _cut(scratch, [layer.weight for layer in batch])) for batch in batches]
        self._arranged = recipe, shapes

    def release(self) -> None:
        """Let every layer read its weight at each forward pass again."""
        self._dense = self._arranged = None
        self._sparse.clear()
        for layer in self._layers:
            layer.step_dtype = layer.step_weight = None
            if isinstance(layer, SparseBitLinear):
                layer.step_fragments = layer.step_row_scale = None


class _Batch:
    """Layers whose effective weights or codes are made at a time, into `out`."""

    def __init__(self, layers: Sequence[LatentLayer], out: Sequence[Tensor]) -> None:
        self.layers, self.out = layers, out
        self.parts = [layer.parts for layer in layers]
        self.scale = empty_scale([layer.weight for layer in layers], self.parts)
        self.scales = self.scale.split([scale_count(layer.weight, layer.parts) for layer in layers])

    def refresh(self, recipe: Recipe) -> None:
        write_effective_weights([layer.weight for layer in self.layers], recipe, self.parts, self.out, self.scale)

    def pack(self, recipe: Recipe) -> None:
        """`out`, which are codes, to the layers' fragments; the layers are linear."""
        linears = [layer for layer in self.layers if isinstance(layer, SparseBitLinear)]
        for layer, scale in zip(linears, self.scales, strict=True):
            rows = layer.out_features
            layer.step_row_scale = scale_by_row(scale, layer.parts, rows).flatten() if layer.parts else scale
        fragments = [layer.step_fragments for layer in linears if layer.step_fragments is not None]
        write_fragments(self.out, recipe.pattern.m, fragments)


def _forget(step_weights: weakref.ref[StepWeights], *_: Any) -> None:
    """After any optimizer's step: a fused one changes weights and leaves their version as it was."""
    if (found := step_weights()) is not None:
        for layer in found._layers:
            layer.step_read = None


def _cut(scratch: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Consecutive parts of `scratch` in these shapes."""
    pieces = scratch[: sum(one.numel() for one in like)].split([one.numel() for one in like])
    return [piece.view(one.shape) for piece, one in zip(pieces, like, strict=True)]


def _is_whole(layer: LatentLayer) -> bool:
    """Whether the weight is here between forward passes: FSDP2 splits it, FSDP1 and ZeRO-3 leave a stump."""
    shape = (layer.out_features, layer.in_features)
    return layer.weight.shape[-2:] == shape and not isinstance(layer.weight, DTensor)
