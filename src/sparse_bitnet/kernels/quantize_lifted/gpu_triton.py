"""Lifted integer activations on a GPU: a program reads a token for its scale, and once more, by windows, for its codes.

The second reading finds the token in the cache. Codes and scale are bit for bit those of the reference. Shapes: T
tokens, I in_features, K lifted columns, m columns a block, 2 m - 4 lifted.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bitnet.formats.windows import lifted_width
from sparse_bitnet.kernels import triton_device
from sparse_bitnet.kernels.quantize_activation.gpu_triton import DTYPES, code_of, load_block, settings, token_scale
from sparse_bitnet.kernels.quantize_lifted import Before
from sparse_bitnet.recipe import Activations

obstacle = triton_device.obstacle


def supports(x: Tensor, activations: Activations, m: int, codes: Tensor, before: Before) -> str | None:
    if before is not None:
        return "it neither multiplies by a gate nor takes a norm"
    if not triton_device.is_within_reach(x):
        return f"the activations are on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"{x.dtype}; it takes {', '.join(map(str, DTYPES))}"
    return None


def run(x: Tensor, activations: Activations, m: int, codes: Tensor, before: Before) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    width = x.shape[-1]
    lifted = torch.empty(*x.shape[:-1], lifted_width(width, m), dtype=torch.int8, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            _quantize_lifted_token[(x.numel() // width,)](
                x, lifted, codes, scale, width, lifted.shape[-1], M=m, KEEPS=codes.numel() > 0,
                **settings(width, activations),
            )  # fmt: skip
    return lifted, scale


@triton.jit
def _quantize_lifted_token(
    x, lifted, codes, scales, width, lifted_width, M: tl.constexpr, KEEPS: tl.constexpr,
    SMALLEST: tl.constexpr, ROOT: tl.constexpr, BLOCK: tl.constexpr, HOLDS: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    x, lifted = x + token * width, lifted + token * lifted_width
    held = load_block(x, tl.arange(0, BLOCK), width)
    scale = token_scale(held, x, width, SMALLEST, ROOT, BLOCK, HOLDS, INT8)
    tl.store(scales + token, scale)
    first = 0
    while first < lifted_width:
        if M == 4:  # no lift
            column = first + tl.arange(0, BLOCK)
            value = held if HOLDS else load_block(x, column, width)
        else:  # window by window, so that the four of each are read and written together
            window, lane = first // 4 + tl.arange(0, BLOCK // 4)[:, None], tl.arange(0, 4)[None, :]
            column = window * 4 + lane
            value = load_block(x, window // (M // 2 - 1) * M + window % (M // 2 - 1) * 2 + lane, width)
        tl.store(lifted + column, code_of(value, scale, INT8).to(tl.int8), mask=column < lifted_width)
        first += BLOCK
    if KEEPS:
        first = 0
        while first < width:
            column = first + tl.arange(0, BLOCK)
            value = held if HOLDS else load_block(x, column, width)
            tl.store(codes + token * width + column, code_of(value, scale, INT8).to(tl.int8), mask=column < width)
            first += BLOCK
