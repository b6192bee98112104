"""What the layers of a model multiply with during one optimizer step, made once for all of its micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_bitnet.kernels.effective_weight import empty_scale, write_effective_weights
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.nn.stored_settings import named_layers


class StepWeights:
    """Effective weights of all trainable layers of `model`, which keep them from one `refresh` to the next.

    On a GPU a refresh is three launches, whatever the number of layers. Call it before the first micro-batch of every
    optimizer step, and `release` at the end. A layer uses what it was given in training mode alone, where it computes
    in `dtype` (None: that of the weight), and, outside of torch.compile, which cannot look, while its weight is still
    the one that was read; else it reads its weight anew. Costs 2 bytes a weight in bf16, which the backward pass keeps
    in any case. Left out are weights split over processes, which are there for the forward pass only.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self._layers = [
            layer for _, layer in named_layers(model) if isinstance(layer, SparseBitLinear) and _is_whole(layer)
        ]
        self._scale: Tensor | None = None

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
        for layer in self._layers:
            layer.step_version = layer.weight._version

    def release(self) -> None:
        """Let every layer read its weight at each forward pass again."""
        self._scale = None
        for layer in self._layers:
            layer.step_weight = None


def _is_whole(layer: SparseBitLinear) -> bool:
    """Whether the weight is here between forward passes: FSDP2 splits it, FSDP1 and ZeRO-3 leave a stump."""
    shape = (layer.out_features, layer.in_features)
    return layer.weight.shape == shape and not isinstance(layer.weight, DTensor)
