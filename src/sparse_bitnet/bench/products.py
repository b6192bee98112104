"""`bench products`: one layer's product with many tokens, on sparse tensor cores and as others do it.

    bf16        the dense product of cuBLAS
    fp8         the dense product of cuBLASLt in e4m3, a scale a token and a row: the quickest dense one
    cusparselt  NVIDIA's library for 2:4 int8, with a scale a row; its result still lacks the scale of the token
    ours        the kernel of sparse_product, scales included
    ours+       the same with the quantisation of its activations; `bf16+` and `fp8+` likewise, as a layer needs them

Weights are taken in turn from several copies that together fill twice the cache, so each comes from memory.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_bitnet.formats.windows import lift_weight
from sparse_bitnet.kernels.quantize_activation import OPERATOR as FAKE_QUANTIZE
from sparse_bitnet.kernels.quantize_lifted import OPERATOR as QUANTIZE_LIFTED
from sparse_bitnet.kernels.sparse_product import OPERATOR as SPARSE_PRODUCT
from sparse_bitnet.kernels.sparse_product import reference
from sparse_bitnet.kernels.timing import milliseconds
from sparse_bitnet.kernels.weight_fragments import empty_fragments, write_fragments
from sparse_bitnet.numerics.nm_mask import nm_mask
from sparse_bitnet.recipe import NMPattern

CACHE_BYTES = 128 * 2**20  # twice the L2 of an H200
REPEATS = 20
SPARSE_INT8_PEAK = 3.958e15  # operations a second, zeros counted, by the data sheet of H100 SXM and H200
LARGEST_FP8 = 448.0


def bench_products(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int], patterns: Sequence[str], device: torch.device
) -> list[dict[str, Any]]:
    """A row for each shape [O, I], number of tokens and pattern: milliseconds, and ratios to bf16 and fp8.

    ValueError where our product differs from the reference: then no speed is told.
    """
    return [
        _row(shape, count, NMPattern.parse(pattern), device)
        for shape in shapes
        for count in tokens
        for pattern in patterns
    ]


def _row(shape: tuple[int, int], tokens: int, pattern: NMPattern, device: torch.device) -> dict[str, Any]:
    height, width = shape
    copies = max(1, CACHE_BYTES // (height * width)) if device.type == "cuda" else 1
    weights = [torch.randint(0, 2, shape, device=device, dtype=torch.int8) * 2 - 1 for _ in range(copies)]
    weights = [
        weight * nm_mask(torch.randn(shape, device=device), pattern) * (torch.rand(shape, device=device) > 0.3)
        for weight in weights
    ]
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    row_scale = torch.rand(1, device=device) + 0.5
    fragments = [empty_fragments(weight, pattern.m) for weight in weights]
    write_fragments(weights, pattern.m, fragments)
    codes, token_scale = QUANTIZE_LIFTED.run(x, "int8", pattern.m)

    def ours(weight: Tensor, codes: Tensor = codes, scale: Tensor = token_scale) -> Tensor:
        return SPARSE_PRODUCT.run(codes, scale, weight, row_scale, None, height, x.dtype)

    few = slice(0, 512)
    found = ours(fragments[0], codes[few].contiguous(), token_scale[few].contiguous())
    expected = reference.run(codes[few], token_scale[few], fragments[0], row_scale, None, height, x.dtype)
    if not torch.allclose(found, expected, rtol=2**-7, atol=1e-6):
        raise ValueError(f"sparse_product is wrong on weights of {shape}: no speed is told, run its tests")

    dense = [weight.to(x.dtype) for weight in weights]
    systems: dict[str, tuple[Callable[[Tensor], object], list[Tensor]]] = {
        "bf16": (partial(F.linear, x), dense),
        "bf16+": (lambda weight: F.linear(FAKE_QUANTIZE.run(x, "int8", x.dtype), weight), dense),
        "ours": (ours, fragments),
        "ours+": (lambda weight: ours(weight, *QUANTIZE_LIFTED.run(x, "int8", pattern.m)), fragments),
    }
    if device.type == "cuda":
        eighths = [weight.to(torch.float8_e4m3fn).T for weight in weights]
        narrow, narrow_scale = _fp8(x)
        ones = torch.ones(1, height, device=device)
        systems["fp8"] = (
            lambda weight: torch._scaled_mm(narrow, weight, narrow_scale, ones, out_dtype=x.dtype),
            eighths,
        )
        compiled = torch.compile(_fp8, dynamic=False)
        compiled(x)
        systems["fp8+"] = (
            lambda weight: torch._scaled_mm(*_interleave(compiled(x), weight, ones), out_dtype=x.dtype),
            eighths,
        )
        library = _cusparselt([lift_weight(weight, pattern.m) for weight in weights], codes, row_scale, x.dtype)
        if library is not None:
            systems["cusparselt"] = library
    row: dict[str, Any] = {"shape": list(shape), "tokens": tokens, "pattern": str(pattern)}
    for name, (run, operands) in systems.items():
        row[f"{name}_ms"] = milliseconds(lambda r=run, o=operands: [r(one) for one in o], REPEATS, device) / copies
    row["sparse_operations_per_second"] = 2e3 * tokens * height * codes.shape[1] / row["ours_ms"]
    row["share_of_sparse_peak"] = row["sparse_operations_per_second"] / SPARSE_INT8_PEAK
    for name in ("bf16", "fp8", "cusparselt"):
        if f"{name}_ms" in row:
            row[f"times_{name}"] = row[f"{name}_ms"] / row["ours_ms"]
    for name in ("bf16", "fp8"):
        if f"{name}+_ms" in row:
            row[f"times_{name}+"] = row[f"{name}+_ms"] / row["ours+_ms"]
    return row


def _fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, I] -> e4m3 [T, I] and its scale [T, 1], by which it is multiplied to come back."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-5) / LARGEST_FP8
    return (x / scale).to(torch.float8_e4m3fn), scale


def _interleave(quantised: tuple[Tensor, Tensor], weight: Tensor, ones: Tensor) -> tuple[Tensor, ...]:
    narrow, scale = quantised
    return narrow, weight, scale, ones


def _cusparselt(
    weights: list[Tensor], codes: Tensor, row_scale: Tensor, dtype: torch.dtype
) -> tuple[Callable[[Tensor], object], list[Tensor]] | None:
    """NVIDIA's sparse product by the algorithm that its search chooses, None where torch cannot run it."""
    if not torch.backends.cusparselt.is_available() or weights[0].shape[0] % 32 or weights[0].shape[1] % 32:
        return None
    compressed = [torch._cslt_compress(weight) for weight in weights]
    alpha = row_scale.expand(weights[0].shape[0]).contiguous()
    chosen = torch._cslt_sparse_mm_search(compressed[0], codes.T, alpha=alpha, out_dtype=dtype, transpose_result=True)
    return (
        lambda weight: torch._cslt_sparse_mm(
            weight, codes.T, alpha=alpha, out_dtype=dtype, transpose_result=True, alg_id=chosen
        ),
        compressed,
    )
