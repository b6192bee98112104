"""Which layers' forward products run on sparse tensor cores in a run: those that are measured to be faster there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch

from sparse_bitnet.nn.sparse_forward import (
    WORTHWHILE_GAIN,
    Shape,
    sparse_forward_gains,
    sparse_forward_obstacle,
    sparse_tensor_core_obstacle,
    worthwhile_shapes,
)
from sparse_bitnet.recipe import Recipe
from sparse_bitnet.training.processes import from_all_processes, is_first_process


@dataclass(frozen=True)
class SparseForward:
    """Picks shapes for `SparseBitNetCallback`: `auto` by measurement, true all that can, false none.

    tokens of a micro-batch in one process; products_per_step as in `sparse_forward_gains`; dtype of the arithmetic.
    ValueError where true is asked for and the device cannot.
    """

    wanted: Literal["auto"] | bool
    tokens: int
    products_per_step: int
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        if self.wanted is True and (obstacle := sparse_tensor_core_obstacle(self.device, self.dtype)):
            raise ValueError(f"training.sparse_forward=true: {obstacle}")

    def __call__(self, shapes: Collection[Shape], recipe: Recipe) -> frozenset[Shape]:
        able = {shape for shape in shapes if sparse_forward_obstacle(recipe, shape) is None}
        if self.wanted is True:
            return frozenset(able)
        return self._faster(able, recipe) if self.wanted == "auto" and able else frozenset()

    def _faster(self, shapes: set[Shape], recipe: Recipe) -> frozenset[Shape]:
        """The first process measures for all, so that all compute alike."""
        if self.device.type != "cuda" or sparse_tensor_core_obstacle(self.device, self.dtype) is not None:
            return frozenset()
        gains: dict[Shape, float] = {}
        if is_first_process():
            gains = sparse_forward_gains(shapes, recipe, self.tokens, self.dtype, self.device, self.products_per_step)
            told = ", ".join(f"{rows} x {columns} {gain:.2f}" for (rows, columns), gain in gains.items())
            print(
                f"forward on sparse tensor cores, times as fast as dense: {told}; used from {WORTHWHILE_GAIN} on",
                flush=True,
            )
        return worthwhile_shapes(from_all_processes(gains)[0])
