"""What the mask and the latent weights of a model do while it trains: observers, kept outside of the layers.

Shapes: O out_features, I in_features, P parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from sparse_bitnet.nn.layer import LatentLayer
from sparse_bitnet.nn.stored_settings import latent_layers
from sparse_bitnet.numerics.ternary import absmean_scale, quantize_weight, scale_by_row, ternary_codes, weight_mask
from sparse_bitnet.training.run_log import HISTOGRAM_BINS, HISTOGRAM_REACH
from sparse_bitnet.training.sharding import whole_tensor

VALLEY = (0.25, 0.75)  # |weight| / scale around the rounding threshold of 0.5


@dataclass(frozen=True)
class LayerReading:
    """Shares of the weights of one layer, or of all together.

    flip_rate      mask entries that changed since the last reading; None at the first
    zeros          codes that are 0 after the mask
    zeros_natural  codes that are 0 before the mask, at the layer's scale (arXiv 2603.05168: about 0.42 once trained)
    zeros_masked   codes that only the mask made 0
    polarisation   latent weights outside the valley 0.25 < |weight| / scale < 0.75 between the codes 0 and +-1, hence
                   settled on a code; 0.71 for Gaussian weights
    """

    flip_rate: float | None
    zeros: float
    zeros_natural: float
    zeros_masked: float
    polarisation: float


class MaskMonitor:
    """Reads the layers of a model; remembers their masks, one bit a weight, to tell what flipped in between.

    A model that is split over processes is read by all of them, in step: each gathers a layer at a time.
    """

    def __init__(self) -> None:
        self._masks: dict[str, Tensor] = {}

    @torch.no_grad()
    def read(self, model: nn.Module) -> tuple[LayerReading | None, dict[str, LayerReading]]:
        """Overall reading, weighted by layer size, and one a layer; (None, {}) for a model without trainable layers."""
        layers = latent_layers(model)
        readings = {name: self._read_layer(name, layer) for name, layer in layers.items()}
        sizes = {name: layer.weight.numel() for name, layer in layers.items()}
        return _weighted_mean(readings, sizes), readings

    def _read_layer(self, name: str, layer: LatentLayer) -> LayerReading:
        weight = whole_tensor(layer.weight.detach())
        mask = weight_mask(weight, layer.recipe, layer.parts)
        scale = _scale(weight, layer)
        zero = ternary_codes(weight, scale, layer.parts) == 0
        if layer.recipe.values != "ternary":  # nothing is rounded to 0
            zero = torch.zeros_like(zero)
        ratio = weight.abs() / scale_by_row(scale, layer.parts, layer.out_features)
        packed = _pack_bits(mask)
        before = self._masks.get(name)
        self._masks[name] = packed
        return LayerReading(
            flip_rate=None if before is None else _differing_bits(before, packed) / mask.numel(),
            zeros=_share(zero | ~mask),
            zeros_natural=_share(zero),
            zeros_masked=_share(~mask & ~zero),
            polarisation=1 - _share((ratio > VALLEY[0]) & (ratio < VALLEY[1])),
        )


@torch.no_grad()
def weight_histograms(model: nn.Module) -> dict[str, dict[str, list[int]]]:
    """By layer, how many latent weights / scale lie in each bin (see run_log.py), kept by the mask and masked.

    For `values="full"`, which has no scale, in units of the mean magnitude.
    """
    return {name: _layer_histograms(layer) for name, layer in latent_layers(model).items()}


def _layer_histograms(layer: LatentLayer) -> dict[str, list[int]]:
    weight = whole_tensor(layer.weight.detach())
    ratio = weight.float() / scale_by_row(_scale(weight, layer), layer.parts, layer.out_features)
    ratio = ratio.clamp_(-HISTOGRAM_REACH, HISTOGRAM_REACH)
    mask = weight_mask(weight, layer.recipe, layer.parts)
    return {"kept": _counts(ratio[mask]), "masked": _counts(ratio[~mask])}


def _scale(weight: Tensor, layer: LatentLayer) -> Tensor:
    """Scale [..., P] fp32 of the codes of weight [..., O, I]; the mean magnitude for `values="full"`, without codes."""
    if layer.recipe.values == "full":
        return absmean_scale(weight, layer.parts)
    return quantize_weight(weight, layer.recipe, layer.parts)[1]


def _counts(ratio: Tensor) -> list[int]:
    return torch.histc(ratio, HISTOGRAM_BINS, -HISTOGRAM_REACH, HISTOGRAM_REACH).long().tolist()


def non_finite_tensors(model: nn.Module) -> list[str]:
    """Names of the parameters that hold NaN or infinity; where they are split over processes, all take part."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    device = parameters[0].device
    sums = torch.stack(
        [whole_tensor(parameter.detach().sum(dtype=torch.float64)).to(device) for parameter in parameters]
    )
    return [name for name, finite in zip(names, sums.isfinite().tolist(), strict=True) if not finite]


@torch.no_grad()
def first_non_finite_module(model: nn.Module, inputs: Mapping[str, Tensor]) -> str | None:
    """Name of the first module, in the order of the forward pass over `inputs`, whose output is not finite."""
    found: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, args: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(tensor, Tensor) and not bool(tensor.isfinite().all()):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _weighted_mean(readings: dict[str, LayerReading], sizes: dict[str, int]) -> LayerReading | None:
    if not readings:
        return None
    total = sum(sizes.values())
    means: dict[str, float | None] = {}
    for field in asdict(next(iter(readings.values()))):
        values = {name: getattr(reading, field) for name, reading in readings.items()}
        known = None not in values.values()
        means[field] = sum(values[name] * sizes[name] for name in values) / total if known else None
    return LayerReading(**means)  # type: ignore[arg-type]


def _share(flags: Tensor) -> float:
    return int(flags.sum()) / flags.numel()


def _pack_bits(flags: Tensor) -> Tensor:
    """Flags [..., I] bool -> one bit each [numel / 8] uint8, on the same device."""
    flat = nn.functional.pad(flags.flatten().to(torch.uint8), (0, -flags.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(-1, dtype=torch.uint8)


def _differing_bits(one: Tensor, other: Tensor) -> int:
    difference = one ^ other
    return sum(int((difference >> bit & 1).sum()) for bit in range(8))
