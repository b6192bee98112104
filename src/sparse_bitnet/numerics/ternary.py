"""Latent weight -> scale, codes, mask, effective weight.

Shapes: O out_features, I in_features, P parts; leading dimensions (experts [E, O, I]) have scales of their own.

A fused projection holds several matrices, each with its own scale. `parts` gives their heights, repeating down the
weight: (q, k, v) for [q; k; v] stacked once, (d, d, d) for q, k, v interleaved head by head. () is one part.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from sparse_bitnet.numerics.nm_mask import nm_mask
from sparse_bitnet.recipe import Recipe

Parts = tuple[int, ...]

SMALLEST_SCALE = 1e-5  # an all-zero weight divides by this, not by zero


def absmean_scale(weight: Tensor, parts: Parts = ()) -> Tensor:
    """Scale [..., P] fp32 = max(mean |weight|, 1e-5), the mean over each part of weight [..., O, I].

    The sum is taken in fp64, so that its rounding to fp32 does not depend on the order of addition, hence not on the
    backend or on how many processes share the tensor. (arXiv 2402.17764, equation 3)
    """
    sums, count = _sums_by_part(weight, parts)
    return (sums / count).clamp(min=SMALLEST_SCALE).float()


def kept_absmean_scale(weight: Tensor, mask: Tensor, parts: Parts = ()) -> Tensor:
    """Scale [..., P] fp32 of the kept weights alone: max(mean of |weight| where mask, 1e-5). (arXiv 2601.07892)"""
    sums, _ = _sums_by_part(weight.masked_fill(~mask, 0), parts)
    kept, _ = _sums_by_part(mask.to(torch.uint8), parts)
    return (sums / kept).clamp(min=SMALLEST_SCALE).float()


def check_parts(parts: Parts, out_features: int, name: str = "the layer") -> None:
    """ValueError where rows do not divide into parts."""
    if parts and (min(parts) < 1 or out_features % sum(parts)):
        raise ValueError(f"{name}: {out_features} rows do not divide into parts of {parts}")


def scale_by_row(scale: Tensor, parts: Parts, out_features: int) -> Tensor:
    """Scale [..., P] -> [..., O, 1], or [..., 1, 1] where one scale serves all rows."""
    if not parts:
        return scale.unsqueeze(-1)
    check_parts(parts, out_features)
    period = [scale[..., i : i + 1].expand(*scale.shape[:-1], height) for i, height in enumerate(parts)]
    return torch.cat(period * (out_features // sum(parts)), dim=-1).unsqueeze(-1)


def ternary_codes(weight: Tensor, scale: Tensor, parts: Parts = ()) -> Tensor:
    """Codes [..., O, I] int8 = clip(round-half-even(weight / scale), -1, 1)."""
    ratio = _at_least_fp32(weight) / scale_by_row(scale, parts, weight.shape[-2])
    return ratio.round().clamp(-1, 1).to(torch.int8)


def sign_codes(weight: Tensor) -> Tensor:
    """Codes [..., O, I] int8 = the sign of the weight, with sign(0) = +1, so that a kept weight is never 0."""
    return torch.where(weight < 0, -1, 1).to(torch.int8)


def weight_mask(weight: Tensor, recipe: Recipe, parts: Parts = ()) -> Tensor:
    """Mask [..., O, I] bool of the recipe: ranked by the latent magnitudes, or by those of the dense codes."""
    if recipe.mask_from == "quantized":
        return nm_mask(ternary_codes(weight, absmean_scale(weight, parts), parts), recipe.pattern)
    return nm_mask(weight, recipe.pattern)


def quantize_weight(weight: Tensor, recipe: Recipe, parts: Parts = ()) -> tuple[Tensor, Tensor]:
    """Latent weight [..., O, I] -> codes [..., O, I] int8, 0 where masked, and scale [..., P] fp32.

    ValueError for `values="full"`, which has no codes. (arXiv 2603.05168, section 3: quantise-then-mask)
    """
    mask = weight_mask(weight, recipe, parts)
    if recipe.values == "ternary":
        source = weight if recipe.order == "quant-then-mask" else weight.masked_fill(~mask, 0)
        scale = absmean_scale(source, parts)
        codes = ternary_codes(source, scale, parts)
    elif recipe.values == "sign":
        scale = kept_absmean_scale(weight, mask, parts)
        codes = sign_codes(weight)
    else:
        raise ValueError(f"values={recipe.values!r} have no codes")
    return codes.masked_fill_(~mask, 0), scale


def dequantize_weight(codes: Tensor, scale: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
    """Codes [..., O, I] int8 and scale [..., P] -> effective weight [..., O, I] = scale * codes in `dtype`."""
    return codes.to(dtype) * scale_by_row(scale, parts, codes.shape[-2]).to(dtype)


def effective_weight(weight: Tensor, recipe: Recipe, parts: Parts, dtype: torch.dtype) -> Tensor:
    """Latent weight [..., O, I] -> what multiplies, in `dtype`: scale * codes * mask, or weight * mask if full."""
    if recipe.values == "full":
        return weight.masked_fill(~weight_mask(weight, recipe, parts), 0).to(dtype)
    codes, scale = quantize_weight(weight, recipe, parts)
    return dequantize_weight(codes, scale, parts, dtype)


def add_residual(effective: Tensor, weight: Tensor, share: Tensor) -> Tensor:
    """Effective weight [..., O, I] + share [] fp32 x latent weight, in the dtype of the effective weight.

    An annealed residual of training ("Arenas", arXiv 2601.07892, equation 7, on the weight instead of the product: with
    one activation the two are the same). Its gradient is its own, share x the incoming one, masked weights included,
    beside the straight-through one. Ternary alone, all weights of one code meet the activations alike, and so do their
    gradients; the residual tells them apart while it lasts.
    """
    return (effective.float() + share * weight.float()).to(effective.dtype)


def _sums_by_part(weight: Tensor, parts: Parts) -> tuple[Tensor, Tensor | int]:
    """Sum of |weight| [..., P] fp64 and the number of weights in each part."""
    height, width = weight.shape[-2:]
    rows = weight.abs().sum(dim=-1, dtype=torch.float64)  # [..., O]
    if not parts:
        return rows.sum(dim=-1, keepdim=True), height * width
    check_parts(parts, height)
    repeats = height // sum(parts)
    period = rows.reshape(*rows.shape[:-1], repeats, sum(parts)).sum(dim=-2)  # [..., sum(parts)]
    ends = zip(parts, accumulate(parts), strict=True)
    sums = torch.stack([period[..., end - part : end].sum(dim=-1) for part, end in ends], dim=-1)
    return sums, torch.tensor([part * repeats * width for part in parts], device=weight.device)


def _at_least_fp32(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
