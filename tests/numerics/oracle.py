"""The numerics contract once more, in NumPy and plain loops, written from its text: the truth that tests compare with.

Weights come as arrays [..., O, I] of at least fp32 (`array` makes one of a tensor), activations as [..., I]. Sums are
taken by `math.fsum`, which rounds once whatever the order. Nothing here imports the package except its settings.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from sparse_bitnet.recipe import NMPattern, Recipe

Array = np.ndarray


def array(tensor: torch.Tensor) -> Array:
    """The tensor's values; bf16 and fp16, which NumPy lacks or treats otherwise, become fp32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


def nm_mask(scores: Array, pattern: NMPattern) -> Array:
    """Of each m scores along the last axis the n largest in magnitude; among equals those of lower index."""
    flat = scores.reshape(-1, pattern.m)
    kept = np.zeros(flat.shape, dtype=bool)
    for group, values in enumerate(flat.tolist()):
        best_first = sorted(range(pattern.m), key=lambda index, values=values: (-abs(values[index]), index))
        kept[group, best_first[: pattern.n]] = True
    return kept.reshape(scores.shape)


def part_of_row(rows: int, parts: tuple[int, ...]) -> list[int]:
    """Which part each row belongs to: the heights repeat down the weight."""
    period = [index for index, height in enumerate(parts or (rows,)) for _ in range(height)]
    return [period[row % len(period)] for row in range(rows)]


def absmean_scale(weight: Array, parts: tuple[int, ...] = (), mask: Array | None = None) -> Array:
    """fp32 [P]: the mean magnitude of each part of weight [O, I], or of its kept weights alone; 1e-5 at the least."""
    owner = part_of_row(len(weight), parts)
    scales = []
    for part in range(max(1, len(parts))):
        rows = [row for row in range(len(weight)) if owner[row] == part]
        chosen = weight[rows] if mask is None else weight[rows][mask[rows]]
        scales.append(max(math.fsum(np.abs(chosen.astype(np.float64)).ravel()) / chosen.size, 1e-5))
    return np.array(scales, dtype=np.float32)


def scale_of_rows(scale: Array, rows: int, parts: tuple[int, ...]) -> Array:
    return scale[part_of_row(rows, parts)][:, None]  # [O, 1]


def ternary_codes(weight: Array, scale: Array, parts: tuple[int, ...] = ()) -> Array:
    return np.clip(np.rint(weight / scale_of_rows(scale, len(weight), parts)), -1, 1).astype(np.int8)


def sign_codes(weight: Array) -> Array:
    return np.where(weight >= 0, 1, -1).astype(np.int8)


def weight_mask(weight: Array, recipe: Recipe, parts: tuple[int, ...] = ()) -> Array:
    if recipe.mask_from == "latent":
        return nm_mask(weight, recipe.pattern)
    return nm_mask(ternary_codes(weight, absmean_scale(weight, parts), parts), recipe.pattern)


def quantize_weight(weight: Array, recipe: Recipe, parts: tuple[int, ...] = ()) -> tuple[Array, Array]:
    """Codes int8 and scale fp32 [..., P] of weight [..., O, I]; each leading index (expert) for itself."""
    if weight.ndim > 2:
        codes, scales = zip(*(quantize_weight(expert, recipe, parts) for expert in weight), strict=True)
        return np.stack(codes), np.stack(scales)
    mask = weight_mask(weight, recipe, parts)
    if recipe.values == "sign":
        return np.where(mask, sign_codes(weight), 0).astype(np.int8), absmean_scale(weight, parts, mask)
    assert recipe.values == "ternary"
    if recipe.order == "mask-then-quant":
        weight = np.where(mask, weight, 0).astype(weight.dtype)
    scale = absmean_scale(weight, parts)
    return np.where(mask, ternary_codes(weight, scale, parts), 0).astype(np.int8), scale


def effective_weight(weight: Array, recipe: Recipe, parts: tuple[int, ...] = ()) -> Array:
    """scale * codes * mask, or weight * mask for full values. Rounding this to a narrower dtype rounds the scale."""
    if weight.ndim > 2:
        return np.stack([effective_weight(expert, recipe, parts) for expert in weight])
    if recipe.values == "full":
        return np.where(nm_mask(weight, recipe.pattern), weight, 0).astype(weight.dtype)
    codes, scale = quantize_weight(weight, recipe, parts)
    return codes * scale_of_rows(scale, len(weight), parts)


def activation_scale(x: Array, activations: str) -> Array:
    """fp32 [..., 1]: 127 / max|x|, or sqrt(7) / mean|x|, of each token."""
    magnitude = np.abs(x.astype(np.float32))
    if activations == "int8":
        return np.float32(127) / np.maximum(magnitude.max(axis=-1, keepdims=True), np.float32(1e-5))
    means = [math.fsum(token) / len(token) for token in magnitude.reshape(-1, x.shape[-1]).astype(np.float64)]
    mean = np.array(means, dtype=np.float32).reshape(*x.shape[:-1], 1)
    return np.float32(math.sqrt(7)) / np.maximum(mean, np.float32(1e-5))


def activation_codes(x: Array, scale: Array, activations: str) -> Array:
    lowest, highest = {"int8": (-128, 127), "int4": (-8, 7)}[activations]
    return np.clip(np.rint(x.astype(np.float32) * scale), lowest, highest).astype(np.int8)


def fake_quantize_activation(x: Array, activations: str) -> Array:
    """fp64 codes / scale, or x itself for `none`."""
    if activations == "none":
        return x.astype(np.float64)
    scale = activation_scale(x, activations)
    return activation_codes(x, scale, activations).astype(np.float64) / scale


def linear(x: Array, weight: Array, bias: Array | None, recipe: Recipe, parts: tuple[int, ...] = ()) -> Array:
    """fp64 y [..., O] = (q . codes^T) * scale / s + bias, the sum over integers exact."""
    offset = 0.0 if bias is None else bias.astype(np.float64)
    if recipe.values == "full":
        weight = effective_weight(weight, recipe).astype(np.float64)
        return fake_quantize_activation(x, recipe.activations) @ weight.T + offset
    codes, scale = quantize_weight(weight, recipe, parts)
    return integer_linear(x, codes, scale_of_rows(scale, len(codes), parts)[:, 0], recipe.activations) + offset


def integer_linear(x: Array, codes: Array, row_scale: Array, activations: str) -> Array:
    """fp64 (q . codes^T) * row_scale / s, for codes [O, I] and row_scale [O]."""
    row_scale = row_scale.astype(np.float64)
    if activations == "none":
        return x.astype(np.float64) @ codes.T.astype(np.float64) * row_scale
    scale = activation_scale(x, activations)
    q = activation_codes(x, scale, activations).astype(np.int64)
    return (q @ codes.T.astype(np.int64)) * row_scale / scale.astype(np.float64)


def linear_gradients(
    gradient: Array, x: Array, weight: Array, recipe: Recipe, parts: tuple[int, ...] = ()
) -> tuple[Array, Array, Array]:
    """fp64 dx, dW, dbias for gradient [T, O] of y: straight through every rounding, and through the mask if dense."""
    gradient = gradient.astype(np.float64)
    dx = gradient @ effective_weight(weight, recipe, parts).astype(np.float64)
    dweight = gradient.T @ fake_quantize_activation(x, recipe.activations)
    if recipe.gradient == "masked":
        dweight = np.where(weight_mask(weight, recipe, parts), dweight, 0)
    return dx, dweight, gradient.sum(axis=0)
