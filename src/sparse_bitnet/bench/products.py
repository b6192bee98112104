"""`bench products`: one layer's product with many tokens, on sparse tensor cores and as others do it.

    bf16         the dense product of cuBLAS
    fp8          the dense product of cuBLASLt in e4m3, by its fast accumulation, a scale a token and a row
    fp8-precise  the same with partial sums added in fp32
    int8         the dense product of cuBLASLt in int8, its sums in int32; `int8+` with quantisation and scales too
    cusparselt   NVIDIA's library for 2:4 int8, with a scale a row; its result still lacks the scale of the token
    ours         the kernel of sparse_product, scales included
    ours+        the same with the quantisation of its activations; `bf16+` and `fp8+` likewise, as a layer needs them

Each system takes its weights in turn from copies of its own that the cache cannot hold together. All are measured
forwards and then backwards, and the mean is told, as a warm GPU is a slower one.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_bitnet.bench.timing import System, cold_copies, times_of
from sparse_bitnet.formats.windows import WINDOW, lift_weight
from sparse_bitnet.kernels.quantize_activation import OPERATOR as FAKE_QUANTIZE
from sparse_bitnet.kernels.quantize_lifted import quantize_lifted
from sparse_bitnet.kernels.sparse_product import OPERATOR as SPARSE_PRODUCT
from sparse_bitnet.kernels.sparse_product import SparseWeight, reference
from sparse_bitnet.kernels.weight_fragments import empty_fragments, write_fragments
from sparse_bitnet.numerics.nm_mask import nm_mask
from sparse_bitnet.recipe import NMPattern

SPARSE_INT8_PEAK = 3.958e15  # operations a second, zeros counted, by the data sheet of H100 SXM and H200
LARGEST_FP8 = 448.0


def bench_products(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int], patterns: Sequence[str], device: torch.device
) -> list[dict[str, Any]]:
    """A row for each shape [O, I], number of tokens and pattern: milliseconds, and ratios, of which `times_8bit+` is
    that to the fastest dense product of 8 bits.

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
    weight = torch.randint(0, 2, shape, device=device, dtype=torch.int8) * 2 - 1
    weight *= nm_mask(torch.randn(shape, device=device), pattern) * (torch.rand(shape, device=device) > 0.3)
    fragments = empty_fragments(weight, pattern.m)
    write_fragments([weight], pattern.m, [fragments])
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    row_scale = torch.rand(1, device=device) + 0.5
    codes, token_scale = quantize_lifted(x, "int8", pattern.m)

    def ours(fragments: Tensor, codes: Tensor = codes, scale: Tensor = token_scale) -> Tensor:
        return SPARSE_PRODUCT.run(codes, scale, SparseWeight(fragments, row_scale, None, height), x.dtype)

    few = slice(0, 512)
    found = ours(fragments, codes[few].contiguous(), token_scale[few].contiguous())
    expected = reference.run(codes[few], token_scale[few], SparseWeight(fragments, row_scale, None, height), x.dtype)
    if not torch.allclose(found, expected, rtol=2**-7, atol=1e-6):
        raise ValueError(f"sparse_product is wrong on weights of {shape}: no speed is told, run its tests")

    dense, sparse = cold_copies(weight.to(x.dtype)), cold_copies(fragments)
    systems: dict[str, System] = {
        "bf16": (partial(F.linear, x), dense),
        "bf16+": (lambda weight: F.linear(FAKE_QUANTIZE.run(x, "int8", x.dtype), weight), dense),
        "ours": (ours, sparse),
        "ours+": (lambda fragments: ours(fragments, *quantize_lifted(x, "int8", pattern.m)), sparse),
    }
    if device.type == "cuda":
        systems |= fp8_systems(weight, x) | _int8_systems(weight, x, row_scale)
        systems |= _cusparselt_system(lift_weight(weight, pattern.m), codes, row_scale, x.dtype)
    row: dict[str, Any] = {"shape": list(shape), "tokens": tokens, "pattern": str(pattern)}
    row |= times_of(systems, device)
    row["sparse_operations_per_second"] = 2e3 * tokens * height * codes.shape[1] / row["ours_ms"]
    row["share_of_sparse_peak"] = row["sparse_operations_per_second"] / SPARSE_INT8_PEAK
    for name in ("bf16", "fp8", "cusparselt"):
        if f"{name}_ms" in row:
            row[f"times_{name}"] = row[f"{name}_ms"] / row["ours_ms"]
    for name in ("bf16", "int8", "fp8"):
        if f"{name}+_ms" in row:
            row[f"times_{name}+"] = row[f"{name}+_ms"] / row["ours+_ms"]
    if device.type == "cuda":
        row["times_8bit+"] = min(row["times_int8+"], row["times_fp8+"])
    return row


def fp8_systems(weight: Tensor, x: Tensor) -> dict[str, System]:
    """`fp8` and `fp8-precise`, products alone, and `fp8+`, with the quantisation of x, over an int8 weight [O, I]."""
    eighths = [copy.T for copy in cold_copies(weight.to(torch.float8_e4m3fn))]
    ones = torch.ones(1, weight.shape[0], device=x.device)
    quantize, _ = _compiled(len(x), *weight.shape)
    narrow, scale = quantize(x)

    def product(weight: Tensor, narrow: Tensor = narrow, scale: Tensor = scale, fast: bool = True) -> Tensor:
        return torch._scaled_mm(narrow, weight, scale, ones, out_dtype=x.dtype, use_fast_accum=fast)

    return {
        "fp8": (product, eighths),
        "fp8+": (lambda weight: product(weight, *quantize(x)), eighths),
        "fp8-precise": (partial(product, fast=False), eighths),
    }


@lru_cache(maxsize=1)
def _compiled(tokens: int, height: int, width: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """_fp8 and _rescale for exactly these sizes, as fast as torch makes them; all patterns of a shape share them.

    Reset before, as there is a limit to how many sizes a function is compiled for, and beyond it is run uncompiled.
    """
    torch.compiler.reset()
    return torch.compile(_fp8, dynamic=False), torch.compile(_rescale, dynamic=False)


def _fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, I] -> e4m3 [T, I] and its scale [T, 1], by which it is multiplied to come back."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-5) / LARGEST_FP8
    return (x / scale).to(torch.float8_e4m3fn), scale


def _int8_systems(weight: Tensor, x: Tensor, row_scale: Tensor) -> dict[str, System]:
    """`int8` and `int8+`, over an int8 weight [O, I]: exact as ours is, and dense."""
    columns = [copy.T for copy in cold_copies(weight)]
    codes, _ = quantize_lifted(x, "int8", WINDOW)
    _, rescale = _compiled(len(x), *weight.shape)

    def layer(weight: Tensor) -> Tensor:
        codes, scale = quantize_lifted(x, "int8", WINDOW)
        return rescale(torch._int_mm(codes, weight), row_scale, scale, x.dtype)

    layer(columns[0])
    return {"int8": (partial(torch._int_mm, codes), columns), "int8+": (layer, columns)}


def _rescale(sums: Tensor, row_scale: Tensor, token_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (sums * (row_scale / token_scale)).to(dtype)


def _cusparselt_system(lifted: Tensor, codes: Tensor, row_scale: Tensor, dtype: torch.dtype) -> dict[str, System]:
    """NVIDIA's sparse product by the algorithm that its search chooses; nothing where torch cannot run it."""
    height, width = lifted.shape
    if not torch.backends.cusparselt.is_available() or height % 32 or width % 32:
        return {}
    compressed = torch._cslt_compress(lifted)
    settings: Any = {"alpha": row_scale.expand(height).contiguous(), "out_dtype": dtype, "transpose_result": True}
    chosen = torch._cslt_sparse_mm_search(compressed, codes.T, **settings)
    return {
        "cusparselt": (
            lambda weight: torch._cslt_sparse_mm(weight, codes.T, alg_id=chosen, **settings),
            cold_copies(compressed),
        )
    }
