"""Readings of the monitors against counts over the mask and the codes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparse_bitnet import Recipe, SparseBitLinear
from sparse_bitnet.nn.summary import summary
from sparse_bitnet.numerics.nm_mask import nm_mask
from sparse_bitnet.numerics.ternary import absmean_scale, ternary_codes
from sparse_bitnet.recipe import MaskFrom, Order, Values
from sparse_bitnet.training.monitors import (
    MaskMonitor,
    first_non_finite_module,
    non_finite_tensors,
    weight_histograms,
)
from sparse_bitnet.training.run_log import HISTOGRAM_MOMENTS, is_histogram_due


@pytest.fixture
def layer() -> SparseBitLinear:
    return SparseBitLinear(40, 7, recipe=Recipe("6:8"))


def model_of(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def test_zeros_are_split_into_natural_ones_and_the_masks(layer: SparseBitLinear) -> None:
    overall, readings = MaskMonitor().read(model_of(layer))
    weight = layer.weight.detach()
    zero, mask = ternary_codes(weight, absmean_scale(weight)) == 0, nm_mask(weight, layer.recipe.pattern)
    reading = readings["0"]
    assert reading.zeros_natural == float(zero.double().mean())
    assert reading.zeros_masked == float((~mask & ~zero).double().mean())
    assert reading.zeros == pytest.approx(reading.zeros_natural + reading.zeros_masked)
    assert overall == reading


@pytest.mark.parametrize("order", ["quant-then-mask", "mask-then-quant"])
@pytest.mark.parametrize("mask_from", ["latent", "quantized"])
def test_the_readings_are_of_the_codes_and_the_scale_that_the_layer_uses(order: Order, mask_from: MaskFrom) -> None:
    layer = SparseBitLinear(64, 32, recipe=Recipe("2:4", order=order, mask_from=mask_from))
    model = model_of(layer)
    reading, (codes, scale) = MaskMonitor().read(model)[1]["0"], layer.quantize_weight()
    assert reading.zeros == summary(model).zeros == float((codes == 0).double().mean())
    assert reading.zeros == pytest.approx(reading.zeros_natural + reading.zeros_masked)
    ratio = layer.weight.detach().abs() / scale
    assert reading.polarisation == pytest.approx(1 - float(((ratio > 0.25) & (ratio < 0.75)).double().mean()))


def test_the_flip_rate_counts_mask_entries_that_changed_since_the_last_reading(layer: SparseBitLinear) -> None:
    monitor, model = MaskMonitor(), model_of(layer)
    assert monitor.read(model)[1]["0"].flip_rate is None
    before = nm_mask(layer.weight, layer.recipe.pattern)
    assert monitor.read(model)[1]["0"].flip_rate == 0
    nn.init.normal_(layer.weight)
    changed = float((nm_mask(layer.weight, layer.recipe.pattern) != before).double().mean())
    assert changed > 0
    assert monitor.read(model)[1]["0"].flip_rate == changed


def test_layers_count_by_their_size(layer: SparseBitLinear) -> None:
    small = SparseBitLinear(8, 1, recipe=Recipe("6:8"))
    overall, readings = MaskMonitor().read(model_of(layer, small))
    mean = (readings["0"].zeros * 280 + readings["1"].zeros * 8) / 288
    assert overall is not None
    assert overall.zeros == pytest.approx(mean)


def test_gaussian_weights_are_0_71_polarised_and_ternary_ones_wholly() -> None:
    layer = SparseBitLinear(512, 512)
    nn.init.normal_(layer.weight)
    within = math.erf(0.75 * math.sqrt(1 / math.pi)) - math.erf(0.25 * math.sqrt(1 / math.pi))
    assert MaskMonitor().read(model_of(layer))[1]["0"].polarisation == pytest.approx(1 - within, abs=0.005)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-1, 2, (512, 512)) * 0.02)
    assert MaskMonitor().read(model_of(layer))[1]["0"].polarisation > 0.99


def test_sign_values_have_no_natural_zeros() -> None:
    reading = MaskMonitor().read(model_of(SparseBitLinear(8, 4, recipe=Recipe("3:4", values="sign"))))[1]["0"]
    assert (reading.zeros_natural, reading.zeros) == (0, 0.25)


def test_a_model_without_trainable_layers_reads_nothing() -> None:
    assert MaskMonitor().read(model_of(nn.Linear(4, 4))) == (None, {})
    assert weight_histograms(model_of(nn.Linear(4, 4))) == {}


@pytest.mark.parametrize("values", ["ternary", "sign", "full"])
def test_histograms_count_every_weight_once_where_it_lies(values: Values) -> None:
    layer = SparseBitLinear(64, 32, recipe=Recipe("6:8", values=values))
    found = {name: torch.tensor(counts) for name, counts in weight_histograms(model_of(layer))["0"].items()}
    mask = nm_mask(layer.weight, layer.recipe.pattern)
    assert (int(found["kept"].sum()), int(found["masked"].sum())) == (int(mask.sum()), int((~mask).sum()))
    scale = layer.quantize_weight()[1] if values != "full" else absmean_scale(layer.weight.detach())
    bins = ((layer.weight.detach() / scale).clamp(-3, 3) * 16 + 48).floor().long().clamp(0, 95)
    assert torch.equal(found["kept"] + found["masked"], torch.bincount(bins.flatten(), minlength=96))


def test_the_bins_within_the_rounding_threshold_hold_the_zeros() -> None:
    layer = SparseBitLinear(64, 32, recipe=Recipe("6:8"))
    found = weight_histograms(model_of(layer))["0"]
    kept_zeros = int(((layer.quantize_weight()[0] == 0) & nm_mask(layer.weight, layer.recipe.pattern)).sum())
    assert sum(found["kept"][40:56]) == kept_zeros > 0


@pytest.mark.parametrize("steps", [1, 7, 16, 40, 1000])
def test_histograms_are_due_evenly_through_a_run_and_at_its_end(steps: int) -> None:
    due = [step for step in range(1, steps + 1) if is_histogram_due(step, steps)]
    assert len(due) == min(steps, HISTOGRAM_MOMENTS)
    assert due[-1] == steps


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_tensors_are_named(layer: SparseBitLinear, value: float) -> None:
    model = model_of(nn.Linear(40, 40), layer)
    assert non_finite_tensors(model) == []
    with torch.no_grad():
        layer.weight[3, 5] = value
    assert non_finite_tensors(model) == ["1.weight"]


def test_the_first_layer_with_a_non_finite_output_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert first_non_finite_module(model, {"input": torch.ones(2, 4)}) is None
    with torch.no_grad():
        model[1].weight.fill_(float("inf"))
    assert first_non_finite_module(model, {"input": torch.ones(2, 4)}) == "1"
