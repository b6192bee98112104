"""Per-token integer activations on a GPU, in one pass: a program holds a token, finds its scale and rounds it.

Codes and scale, which `quantize_lifted` gives, are bit for bit those of the reference: the scale is a true quotient
(`div_rn`; Triton's `/` is 2 ulp off) and no product is fused with a sum. Rounded back, a code is multiplied by
1 / scale, an ulp of fp32 from the reference, which divides: a division for each element took three times as long as a
copy. A token longer than LARGEST_BLOCK is read twice, block by block. Shapes: T tokens, I in_features.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bitnet.kernels import triton_device
from sparse_bitnet.numerics.activation import SMALLEST_MAGNITUDE, SQUARE_ROOT_OF_7
from sparse_bitnet.recipe import Activations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_BLOCK = 16384  # elements of a token that a program holds
obstacle = triton_device.obstacle


def supports(x: Tensor, activations: Activations, dtype: torch.dtype) -> str | None:
    if not triton_device.is_within_reach(x):
        return f"the activations are on {x.device.type}"
    for one in (x.dtype, dtype):
        if one not in DTYPES:
            return f"{one}; it takes and gives {', '.join(map(str, DTYPES))}"
    return None


def run(x: Tensor, activations: Activations, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    if x.numel():
        with torch.cuda.device_of(x):
            _fake_quantize_token[(x.numel() // x.shape[-1],)](x, out, x.shape[-1], **settings(x.shape[-1], activations))
    return out


def settings(width: int, activations: Activations, most_warps: int = 16) -> dict[str, Any]:
    """How a kernel that gives a program a token of this width is launched."""
    block = min(triton.next_power_of_2(width), LARGEST_BLOCK)
    return {
        "SMALLEST": SMALLEST_MAGNITUDE, "ROOT": SQUARE_ROOT_OF_7, "BLOCK": block, "HOLDS": width <= block,
        "INT8": activations == "int8", "num_warps": max(1, min(most_warps, block // 512)), "enable_fp_fusion": False,
    }  # fmt: skip


@triton.jit
def _round(x):
    """Half to even, for |x| < 2^22: beyond 1.5 * 2^23 a float has no fraction left."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def load_block(x, column, width):
    return tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)


@triton.jit
def _magnitude(value, INT8: tl.constexpr):
    if INT8:
        return tl.where(value == value, tl.abs(value), float("inf"))  # a maximum passes over NaN
    else:
        return tl.abs(value).to(tl.float64)


@triton.jit
def code_of(value, factor, INT8: tl.constexpr):
    code = _round(value * factor)
    lowest, highest = (-128.0, 127.0) if INT8 else (-8.0, 7.0)
    return tl.where(code < lowest, lowest, tl.where(code > highest, highest, code))  # NaN stays NaN


@triton.jit
def token_scale(
    held, x, width,
    SMALLEST: tl.constexpr, ROOT: tl.constexpr, BLOCK: tl.constexpr, HOLDS: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """The scale of the token at x, whose first BLOCK elements are `held`."""
    magnitudes = _magnitude(held, INT8)
    if not HOLDS:
        first = BLOCK
        while first < width:
            more = _magnitude(load_block(x, first + tl.arange(0, BLOCK), width), INT8)
            magnitudes = tl.maximum(magnitudes, more) if INT8 else magnitudes + more
            first += BLOCK
    if INT8:
        magnitude, number = tl.max(magnitudes, axis=0), 127.0
    else:
        magnitude, number = (tl.sum(magnitudes, axis=0) / width).to(tl.float32), ROOT
    magnitude = tl.where(magnitude < SMALLEST, SMALLEST, magnitude)
    return tl.div_rn(tl.full([], number, tl.float32), magnitude)


@triton.jit
def _fake_quantize_token(
    x, out, width,
    SMALLEST: tl.constexpr, ROOT: tl.constexpr, BLOCK: tl.constexpr, HOLDS: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    x, out = x + token * width, out + token * width
    held = load_block(x, tl.arange(0, BLOCK), width)
    scale = token_scale(held, x, width, SMALLEST, ROOT, BLOCK, HOLDS, INT8)
    inverse = tl.div_rn(tl.full([], 1.0, tl.float32), scale)
    first = 0
    while first < width:
        column = first + tl.arange(0, BLOCK)
        code = code_of(held if HOLDS else load_block(x, column, width), scale, INT8)
        tl.store(out + column, (code * inverse).to(out.dtype.element_ty), mask=column < width)
        first += BLOCK
