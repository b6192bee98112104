"""`bench kernels`: the ops of training alone, beside a copy of the same bytes and the usual PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from sparse_bitnet.bench.baselines import plain_effective_weight
from sparse_bitnet.bench.checks import check_kernels
from sparse_bitnet.bench.timing import REPEATS, copy_bandwidth
from sparse_bitnet.kernels import effective_weight, quantize_activation
from sparse_bitnet.kernels.effective_weight import empty_scale
from sparse_bitnet.kernels.timing import milliseconds
from sparse_bitnet.numerics.activation import fake_quantize_activation
from sparse_bitnet.recipe import Recipe


def bench_effective_weight(shape: tuple[int, int], patterns: list[str], device: torch.device) -> list[dict[str, Any]]:
    """For each pattern: times and ratios of fp32 latent weight [O, I] -> bf16 effective weight."""
    bandwidth = copy_bandwidth(device)
    weight = torch.randn(shape, device=device) * 0.02
    out = torch.empty_like(weight, dtype=torch.bfloat16)
    scale = empty_scale([weight], [()])
    moved = 2 * weight.nbytes + out.nbytes  # read twice: for the scale, and for what the scale makes of it
    rows = []
    for pattern in patterns:
        recipe = Recipe(pattern)
        check_kernels([shape], recipe, torch.bfloat16, device)
        arguments = ([weight], recipe, [()], [out], scale)
        ours = milliseconds(partial(effective_weight.OPERATOR.run, *arguments), REPEATS, device)
        plain = milliseconds(partial(plain_effective_weight, weight, recipe.pattern, out.dtype), 3, device)
        rows.append(
            {
                "op": "effective_weight", "shape": list(shape), "pattern": pattern, "ms": ours, "plain_ms": plain,
                "times_plain": plain / ours, "roofline_ms": 1e3 * moved / bandwidth,
                "share_of_copy_bandwidth": 1e3 * moved / bandwidth / ours, "copy_bytes_per_second": bandwidth,
            }
        )  # fmt: skip
    return rows


def bench_quantize_activation(shapes: list[tuple[int, int]], device: torch.device) -> list[dict[str, Any]]:
    """For each shape [T, I] in bf16: times and ratios of fake-quantised int8 activations."""
    bandwidth = copy_bandwidth(device)
    rows = []
    for tokens, width in shapes:
        check_kernels([(8, width)], Recipe("8:8"), torch.bfloat16, device)
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
        ours = milliseconds(partial(quantize_activation.OPERATOR.run, x, "int8", x.dtype), REPEATS, device)
        plain = milliseconds(partial(fake_quantize_activation, x, "int8", x.dtype), 3, device)
        roofline = 2e3 * x.nbytes / bandwidth
        rows.append(
            {
                "op": "quantize_activation", "shape": [tokens, width], "pattern": "-", "ms": ours, "plain_ms": plain,
                "times_plain": plain / ours, "roofline_ms": roofline, "share_of_copy_bandwidth": roofline / ours,
                "copy_bytes_per_second": bandwidth,
            }
        )  # fmt: skip
    return rows
