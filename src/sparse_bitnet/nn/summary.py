"""What a model consists of, layer by layer: pattern, bits a weight, zeros, and whether the n:m constraint holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bitnet.formats import choose_format
from sparse_bitnet.nn.layer import LatentLayer, PackedLayer
from sparse_bitnet.nn.stored_settings import layer_format, named_layers
from sparse_bitnet.numerics.ternary import effective_weight
from sparse_bitnet.recipe import NMPattern


@dataclass(frozen=True)
class LayerSummary:
    """One layer. `bits` a weight, as stored once packed; `zeros` a share of 1; `scale` one value a part.

    A weight of a mixture's experts is one layer with `matrices` of the same shape, and scales expert by expert.
    """

    name: str
    matrices: int
    out_features: int
    in_features: int
    pattern: str
    values: str
    format: str
    bits: float
    zeros: float
    scale: tuple[float, ...]
    holds_pattern: bool

    @property
    def weights(self) -> int:
        return self.matrices * self.out_features * self.in_features


@dataclass(frozen=True)
class Summary:
    """All sparse ternary layers of a model, and the parameters beside them. `str()` gives the table."""

    layers: tuple[LayerSummary, ...]
    other_parameters: int

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def bits(self) -> float:
        """Mean bits a weight of the sparse ternary layers."""
        return self._mean("bits")

    @property
    def zeros(self) -> float:
        """Share of zeros among the weights of the sparse ternary layers."""
        return self._mean("zeros")

    @property
    def holds_pattern(self) -> bool:
        return all(layer.holds_pattern for layer in self.layers)

    def _mean(self, field: str) -> float:
        total = sum(getattr(layer, field) * layer.weights for layer in self.layers)
        return total / max(self.weights, 1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "other_parameters": self.other_parameters,
            "bits": self.bits,
            "zeros": self.zeros,
            "holds_pattern": self.holds_pattern,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        header = ("layer", "shape", "pattern", "values", "format", "bits", "zeros", "scale", "n:m")
        rows = [header, *(self._row(layer) for layer in self.layers)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = (
            f"{len(self.layers)} layers, {self.weights:,} weights at {self.bits:.2f} bits, "
            f"{100 * self.zeros:.1f} % zeros; {self.other_parameters:,} other parameters; "
            f"n:m {'holds everywhere' if self.holds_pattern else 'IS VIOLATED'}"
        )
        return "\n".join([*lines, total])

    @staticmethod
    def _row(layer: LayerSummary) -> tuple[str, ...]:
        scales = " ".join(f"{scale:.3g}" for scale in layer.scale) or "-"
        shape = f"{layer.out_features}x{layer.in_features}"
        if layer.matrices > 1:
            shape = f"{layer.matrices}x{shape}"
            scales = f"{min(layer.scale):.3g} to {max(layer.scale):.3g}" if layer.scale else "-"
        zeros = f"{100 * layer.zeros:.1f} %"
        held = "ok" if layer.holds_pattern else "VIOLATED"
        return (
            layer.name, shape, layer.pattern, layer.values, layer.format, f"{layer.bits:.2f}", zeros, scales, held,
        )  # fmt: skip


@torch.no_grad()
def summary(model: nn.Module) -> Summary:
    """The layers of this package in `model`, trainable or packed; ValueError where there are none."""
    layers = tuple(_layer_summary(name, layer) for name, layer in named_layers(model))
    if not layers:
        raise ValueError("the model has no sparse ternary layers: call prepare(model, recipe) first")
    ours = {id(parameter) for _, layer in named_layers(model) for parameter in [layer.weight]}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in ours)
    return Summary(layers, others)


def holds_pattern(weight: Tensor, pattern: NMPattern) -> bool:
    """True where no group of m along the rows of weight [..., O, I] has more than n values that are not zero."""
    return bool((weight.unflatten(-1, (-1, pattern.m)).count_nonzero(dim=-1) <= pattern.n).all())


def _layer_summary(name: str, layer: LatentLayer | PackedLayer) -> LayerSummary:
    recipe, scale = layer.recipe, torch.empty(0)
    if isinstance(layer, PackedLayer):
        weight, scale = layer.codes(), layer.weight_scale
        bits = 8 * layer.weight.numel() / weight.numel()
    elif recipe.values == "full":
        weight = effective_weight(layer.weight, recipe, layer.parts, layer.weight.dtype)
        bits = 8.0 * layer.weight.element_size()
    else:
        weight, scale = layer.quantize_weight()
        bits = 8 * choose_format(recipe).bytes_per_row(layer.in_features) / layer.in_features
    return LayerSummary(
        name=name,
        matrices=weight.shape[:-2].numel(),
        out_features=layer.out_features,
        in_features=layer.in_features,
        pattern=str(recipe.pattern),
        values=recipe.values,
        format=layer_format(layer),
        bits=bits,
        zeros=1 - int(weight.count_nonzero()) / weight.numel(),
        scale=tuple(float(value) for value in scale.flatten()),
        holds_pattern=holds_pattern(weight, recipe.pattern),
    )
