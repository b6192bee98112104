"""What the layers of a model multiply with during one optimizer step, made once for all of its micro-batches."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_bitnet.kernels.effective_weight import empty_scale, scale_count, write_effective_weights
from sparse_bitnet.kernels.weight_fragments import empty_fragments, write_fragments
from sparse_bitnet.nn.layer import LatentLayer
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.nn.sparse_forward import Shape, sparse_forward_obstacle
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.numerics.ternary import scale_by_row
from sparse_bitnet.recipe import Recipe


class StepWeights:
    """Effective weights of all trainable layers of `model`, which keep them from one `refresh` to the next.

    On a GPU a refresh is three launches, whatever the number of layers. Call it before the first micro-batch of every
    optimizer step, and `release` at the end. A layer uses what it was given in training mode alone, where it computes
    in `dtype` (None: that of the weight), and, outside of torch.compile, which cannot look, while its weight is still
    the one that was read; else it reads its weight anew. Costs 2 bytes a weight in bf16, which the backward pass keeps
    in any case. Left out are weights split over processes, which are there for the forward pass only.

    Layers whose shape [O, I] is among `sparse_shapes` get their weight for sparse tensor cores too, where their recipe
    has such a form: their forward products then run there (see sparse_forward.py, whose `sparse_forward_gains` tells
    where that pays), for one launch more and a quarter of a byte a weight (2:4) or three eighths (6:8).
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None = None, sparse_shapes: Collection[Shape] = ()
    ) -> None:
        self.dtype = dtype
        self.sparse_shapes = sparse_shapes
        self._layers = [
            layer for _, layer in named_layers(model) if isinstance(layer, LatentLayer) and _is_whole(layer)
        ]
        self._scale: Tensor | None = None
        self._sparse: list[tuple[SparseBitLinear, Tensor]] = []  # those with fragments, and their scale [P]
        self._arranged: tuple[Recipe, Collection[Shape]] | None = None

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
        weights = [layer.weight for layer in self._layers]
        parts = [layer.parts for layer in self._layers]
        if self._scale is None:
            self._scale = empty_scale(weights, parts)
            for layer in self._layers:
                layer.step_weight = torch.empty_like(layer.weight, dtype=self.dtype)
        out = [layer.step_weight for layer in self._layers if layer.step_weight is not None]
        write_effective_weights(weights, self._layers[0].recipe, parts, out, self._scale)
        self._refresh_fragments(self._scale)
        for layer in self._layers:
            layer.step_version = layer.weight._version

    def _refresh_fragments(self, scale: Tensor) -> None:
        recipe = self._layers[0].recipe
        if self._arranged != (recipe, self.sparse_shapes):
            self._arrange_fragments(recipe, scale)
        for layer, one in self._sparse:
            if layer.parts:
                layer.step_row_scale = scale_by_row(one, layer.parts, layer.out_features).flatten()
        pairs = [(layer.step_weight, layer.step_fragments) for layer, _ in self._sparse]
        effective, fragments = zip(*pairs, strict=True) if pairs else ((), ())
        write_fragments(effective, recipe.pattern.m, fragments)

    def _arrange_fragments(self, recipe: Recipe, scale: Tensor) -> None:
        """Room for the fragments of the layers that have them, anew where pattern or shapes have changed."""
        scales = scale.split([scale_count(layer.weight, layer.parts) for layer in self._layers])
        self._sparse.clear()
        for layer, one in zip(self._layers, scales, strict=True):
            if not isinstance(layer, SparseBitLinear):
                continue
            shape = layer.out_features, layer.in_features
            layer.step_fragments = layer.step_row_scale = None
            if shape in self.sparse_shapes and sparse_forward_obstacle(recipe, shape) is None:
                layer.step_fragments = empty_fragments(layer.weight, recipe.pattern.m)
                layer.step_row_scale = one
                self._sparse.append((layer, one))
        self._arranged = recipe, self.sparse_shapes

    def release(self) -> None:
        """Let every layer read its weight at each forward pass again."""
        self._scale = self._arranged = None
        self._sparse.clear()
        for layer in self._layers:
            layer.step_weight = None
            if isinstance(layer, SparseBitLinear):
                layer.step_fragments = layer.step_row_scale = None


def _is_whole(layer: LatentLayer) -> bool:
    """Whether the weight is here between forward passes: FSDP2 splits it, FSDP1 and ZeRO-3 leave a stump."""
    shape = (layer.out_features, layer.in_features)
    return layer.weight.shape[-2:] == shape and not isinstance(layer.weight, DTensor)
