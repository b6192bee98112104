"""The forward product of a training layer on sparse tensor cores: exact integers, and the gradients of a float product.

Shapes: T tokens (any leading dimensions), O out_features, I in_features, K lifted columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_bitnet.formats.windows import lift_obstacle, lifted_width
from sparse_bitnet.kernels.dequantize_fragments import dequantize_fragments
from sparse_bitnet.kernels.dispatch import forcing
from sparse_bitnet.kernels.quantize_activation import fake_quantize_activation
from sparse_bitnet.kernels.quantize_lifted import quantize_and_lift
from sparse_bitnet.kernels.sparse_product import (
    COLUMNS_MULTIPLE,
    OPERATOR,
    ROWS_MULTIPLE,
    SparseWeight,
    sparse_product,
)
from sparse_bitnet.kernels.timing import milliseconds
from sparse_bitnet.kernels.weight_fragments import empty_fragments, write_fragments
from sparse_bitnet.numerics.ste import activation_gradient, latent_weight_gradient
from sparse_bitnet.numerics.ternary import Parts
from sparse_bitnet.recipe import Recipe

Shape = tuple[int, int]  # [O, I]

REPEATS = 10
WORTHWHILE_GAIN = 1.2  # steps of 1.5B and 3B shapes, at 2:4 and 6:8, were no slower for what gained as much, on an H100


def sparse_forward_obstacle(recipe: Recipe, shape: Shape) -> str | None:
    """Why the product with a weight [O, I] of this recipe has no form for sparse tensor cores; None where it has."""
    if recipe.values == "full" or recipe.activations == "none":
        return "the product is one of floats: it needs ternary or sign values and int8 or int4 activations"
    rows, columns = shape[0], lifted_width(shape[1], recipe.pattern.m)
    if columns % COLUMNS_MULTIPLE or rows % ROWS_MULTIPLE:
        return f"{rows} rows of {columns} lifted columns: not multiples of {ROWS_MULTIPLE} and {COLUMNS_MULTIPLE}"
    return lift_obstacle(recipe.pattern)


def sparse_tensor_core_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no sparse tensor cores give results in `dtype` on this device; None where they do."""
    if (forced := forcing()) is not None:
        return forced
    codes, one = torch.zeros(1, 64, dtype=torch.int8, device=device), torch.ones(1, 1, device=device)
    fragments = empty_fragments(torch.zeros(8, 64, device=device), 4)
    first = OPERATOR.explain(codes, one, SparseWeight(fragments, one[0], None, 8), dtype).splitlines()[0]
    answer = first.partition(": ")[2]
    return None if answer == "yes" else answer


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    fragments: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    parts: Parts,
    dtype: torch.dtype,
) -> Tensor:
    """x [..., I] times the effective weight of the latent `weight` [O, I], plus bias: [..., O] in `dtype`.

    The effective weight is given as `fragments` (formats/fragments.py) and `row_scale` [O] or [1] fp32. Its sums with
    the activations' codes are exact, and rescaled once. The gradients are those of fake_quantize(x) . effective^T +
    bias in `dtype`; for them the codes of x are saved, a byte each, and the effective weight is made from fragments.
    """
    return _SparseLinear.apply(x, weight, bias, fragments, row_scale, recipe, parts, dtype)  # type: ignore[no-any-return]


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        fragments: Tensor,
        row_scale: Tensor,
        recipe: Recipe,
        parts: Parts,
        dtype: torch.dtype,
    ) -> Tensor:
        lifted, scale, codes = quantize_and_lift(x, recipe.activations, recipe.pattern.m)
        ctx.save_for_backward(codes, scale, weight, fragments, row_scale)
        ctx.recipe, ctx.parts, ctx.dtype = recipe, parts, dtype
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        added = None if bias is None else bias.float()
        return sparse_product(lifted, scale, fragments, row_scale, added, weight.shape[0], dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        codes, scale, weight, fragments, row_scale = ctx.saved_tensors
        gradient = gradient.to(ctx.dtype)
        rows = gradient.reshape(-1, gradient.shape[-1])  # [T, O]
        effective = dequantize_fragments(fragments, row_scale, *weight.shape, ctx.recipe.pattern.m, ctx.dtype)
        to_x = activation_gradient(gradient @ effective, ctx.x_dtype)
        fake = (codes / scale).to(ctx.dtype)  # [..., I]
        to_weight = latent_weight_gradient(rows.T @ fake.reshape(-1, fake.shape[-1]), weight, ctx.recipe, ctx.parts)
        to_bias = None if ctx.bias_dtype is None else rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return to_x, to_weight, to_bias, None, None, None, None, None


def sparse_forward_gains(
    shapes: Iterable[Shape],
    recipe: Recipe,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    products_per_step: int = 1,
) -> dict[Shape, float]:
    """How many times as fast as the dense one the forward product on sparse tensor cores is, measured, for each shape.

    tokens             of a micro-batch, in one process
    products_per_step  forward products between two optimizer steps, which share the packing of the weight: one a
                       micro-batch, two where it is recomputed

    The quantisation of the activations counts on both sides. Shapes that have no sparse form are left out.
    """
    able = {shape for shape in shapes if sparse_forward_obstacle(recipe, shape) is None}
    gains = {}
    own = torch.Generator(device)  # the random numbers of the run stay what they are
    for shape in sorted(able):
        x = torch.randn(tokens, shape[1], device=device, dtype=dtype, generator=own)
        kept = torch.arange(shape[1], device=device) % recipe.pattern.m < recipe.pattern.n
        effective = torch.randn(shape, device=device, generator=own).sign().to(dtype) * kept
        dense, sparse, pack = _forward_products(x, effective, recipe)
        pack()
        times = [milliseconds(run, REPEATS, device) for run in (dense, sparse, pack)]
        gains[shape] = times[0] / (times[1] + times[2] / products_per_step)
    return gains


def worthwhile_shapes(gains: Mapping[Shape, float]) -> frozenset[Shape]:
    """Of what `sparse_forward_gains` found, the shapes that a step gets faster by."""
    return frozenset(shape for shape, gain in gains.items() if gain >= WORTHWHILE_GAIN)


def _forward_products(x: Tensor, effective: Tensor, recipe: Recipe) -> tuple[Callable[[], object], ...]:
    """The dense product, the sparse one, and the packing of its weight."""
    m, one = recipe.pattern.m, torch.ones(1, device=x.device)
    fragments = empty_fragments(effective, m)

    @torch.no_grad()
    def dense() -> Tensor:
        return F.linear(fake_quantize_activation(x, recipe.activations, x.dtype), effective)

    @torch.no_grad()
    def sparse() -> Tensor:
        lifted, scale, _ = quantize_and_lift(x, recipe.activations, m)
        return sparse_product(lifted, scale, fragments, one, None, effective.shape[0], x.dtype)

    return dense, sparse, lambda: write_fragments([effective], m, [fragments])
