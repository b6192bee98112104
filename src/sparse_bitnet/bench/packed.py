"""`bench packed`: one packed layer with few tokens on a GPU, beside the dense ones: what a step of decoding is made of.

    bf16    the dense product of cuBLAS
    fp8     the dense product of cuBLASLt in e4m3, by its fast accumulation, a scale a token and a row, and the
            quantisation of its activations
    ours    packed_linear: quantisation, product, scales

All give bf16, in a CUDA graph, and are measured forwards and then backwards. Weights are taken in turn from copies that
together fill twice the cache, or are 64.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from sparse_bitnet.bench.checks import check_packed_linear
from sparse_bitnet.bench.products import fp8_systems
from sparse_bitnet.bench.timing import System, cold_copies, copy_bandwidth, times_of
from sparse_bitnet.formats import i2
from sparse_bitnet.kernels.packed_linear import OPERATOR, PackedLayout


def bench_packed(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int], device: torch.device
) -> list[dict[str, Any]]:
    """A row for each shape [O, I] and number of tokens: milliseconds, ratios to bf16 and fp8, share of the bandwidth.

    ValueError where our product is not the reference's: then no speed is told.
    """
    bandwidth = copy_bandwidth(device)
    return [row for shape in shapes for row in _rows(shape, tokens, bandwidth, device)]


def _rows(
    shape: tuple[int, int], tokens: Sequence[int], bandwidth: float, device: torch.device
) -> list[dict[str, Any]]:
    codes = torch.randint(-1, 2, shape, device=device, dtype=torch.int8)
    packed = cold_copies(i2.pack(codes))
    layout, scale = PackedLayout("i2", shape[1], "int8"), torch.ones(1, device=device)
    check_packed_linear(packed[0], layout, tokens)
    dense = cold_copies(codes.to(torch.bfloat16))
    rows = []
    for count in tokens:
        x = torch.randn(count, shape[1], device=device, dtype=torch.bfloat16)
        systems: dict[str, System] = {
            "bf16": (partial(F.linear, x), dense),
            "ours": (lambda weight, x=x: OPERATOR.run(x, weight, scale, None, layout), packed),
        }
        if device.type == "cuda":
            systems["fp8"] = fp8_systems(codes, x)["fp8+"]
        row: dict[str, Any] = {"shape": list(shape), "tokens": count, "packed_bytes": packed[0].nbytes}
        row |= times_of(systems, device)
        row |= {f"times_{name}": row[f"{name}_ms"] / row["ours_ms"] for name in systems if name != "ours"}
        row["share_of_copy_bandwidth"] = 1e3 * row["packed_bytes"] / bandwidth / row["ours_ms"]
        rows.append(row | {"copy_bytes_per_second": bandwidth})
    return rows
