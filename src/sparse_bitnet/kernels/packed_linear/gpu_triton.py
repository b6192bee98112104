"""On a GPU, for few tokens: int8 activations x the 2 bits of `i2`, unpacked in registers, integers summed exactly.

Bits 2p and 2p + 1 of the bytes of a row are plane p: the codes 4b + p, each + 1. Where activations lie in that order,
q [T, 4, B], nothing has to be interleaved: q . codes = sum over p of plane_p . q_p - sum of q, and a mask takes a
plane off a word of 16 codes. Two launches; on Hopper the second begins to read weights during the first:

    quantise   a program a token: codes in planes, their sum, the scale
    multiply   words: few tokens, products of four bytes (dp4a) over a tile of rows x words
               bytes: more tokens, or rows that do not begin at a word: int8 tensor cores, four products a tile;
               where rows alone do not fill the GPU, columns are split, and a third launch adds the parts

Floats are those of the reference bit for bit: the same operations in the same order, none fused.
Shapes: T tokens, O out_features, I in_features, B bytes a row, P parts.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_bitnet.kernels import triton_device
from sparse_bitnet.kernels.packed_linear import PackedLayout, check_arguments
from sparse_bitnet.kernels.packed_linear.reference import WIDEST_EXACT_IN_FP32
from sparse_bitnet.kernels.quantize_activation.gpu_triton import (
    DTYPES,
    LARGEST_BLOCK,
    code_of,
    load_block,
    settings,
    token_scale,
)
from sparse_bitnet.numerics.ternary import Parts

MANY_ROWS = 8192  # that fill a GPU without splitting columns
MOST_TOKENS_IN_WORDS = {False: 4, True: 2}  # by whether there are many rows
PROGRAMS = 448  # enough of them to fill an H100 or H200, whose multiprocessors hold a few at a time
WIDEST_PART = 4096  # columns of a token that a program quantises, where tokens are few
FEW_TOKENS = 16
FINISHED_ROWS = 256  # that a program of the third launch adds up
INTERPRETED = tl.constexpr(triton_device.INTERPRETED)
obstacle = triton_device.obstacle


@dataclass(frozen=True)
class Tile:
    """How the product is cut up: what a program multiplies at a time, and with how many warps.

    block is in words of 4 bytes where `words`, else in bytes; splits are parts of a row, each summed by a program.
    """

    words: bool
    tokens: int
    rows: int
    block: int
    warps: int
    splits: int = 1
    stages: int = 1


def choose_tile(tokens: int, rows: int, row_bytes: int) -> Tile:
    """For T, O and B: the best of a sweep on an H100, by the five shapes of `bench packed`."""
    many = rows >= MANY_ROWS
    if tokens <= MOST_TOKENS_IN_WORDS[many] and row_bytes % 4 == 0:
        width = max(16, triton.next_power_of_2(row_bytes // 4))
        block = min(width, 128 if many else 512)
        return Tile(True, triton.next_power_of_2(tokens), max(4, 256 // block), block, triton.cdiv(block, 128))
    width = min(64, max(16, triton.next_power_of_2(tokens)))
    height, block, warps, stages = (128, 64, 8, 4) if many and tokens > 64 else (64, 128, 4, 3)
    programs = max(1, triton.cdiv(rows, height) * triton.cdiv(tokens, width))
    splits = max(1, min(8, PROGRAMS // programs, row_bytes // (2 * block)))
    return Tile(False, width, height, block, warps, splits, stages)


def quantized_parts(tokens: int, width: int) -> int:
    """Into how many parts of a token programs share its quantisation."""
    return triton.cdiv(width, WIDEST_PART) if tokens <= FEW_TOKENS else 1


def supports(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, layout: PackedLayout) -> str | None:
    for tensor in (x, weight, scale, bias):
        if tensor is not None and not triton_device.is_within_reach(tensor):
            return f"a tensor is on {tensor.device.type}"
    for tensor in (x, bias):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{tensor.dtype}; it takes {', '.join(map(str, DTYPES))}"
    if layout.activations == "none":
        return "activations='none' are no integers"
    if layout.format != "i2":
        return f"it reads the format i2, not {layout.format}"
    if layout.in_features > WIDEST_EXACT_IN_FP32:
        return f"in_features={layout.in_features} is beyond {WIDEST_EXACT_IN_FP32}, above which fp32 is not exact"
    if weight.numel() >= 2**31:
        return f"a weight of {weight.numel()} bytes, which 32 bits do not count"
    return None


def run(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, layout: PackedLayout) -> Tensor:
    tile = choose_tile(x.numel() // max(1, layout.in_features), *weight.shape)
    return run_tile(x, weight, scale, bias, layout, tile)


def run_tile(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, layout: PackedLayout, tile: Tile) -> Tensor:
    """`run` with a tile that is given, for those who look for the best one."""
    check_arguments(x, weight, scale, bias, layout)
    width, (rows, row_bytes) = layout.in_features, weight.shape
    y = x.new_empty(*x.shape[:-1], rows)
    if not y.numel():
        return y
    x, weight = x.contiguous(), weight.contiguous()
    tokens = x.numel() // width
    codes = torch.empty(tokens, 4, row_bytes, dtype=torch.int8, device=x.device)
    parts = quantized_parts(tokens, width)
    sums = torch.empty(parts, tokens, dtype=torch.int32, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _quantize[(tokens, parts)](
            x, codes, sums, scales, width, row_bytes, OVERLAPS=_overlap(x.device), PARTS=parts,
            PART=min(LARGEST_BLOCK, max(4, triton.next_power_of_2(triton.cdiv(width, parts)))),
            **settings(max(4, width), layout.activations, most_warps=32),
        )  # fmt: skip
    multiply(codes, sums, scales, weight, scale, bias, layout.parts, y, tile)
    return y


def multiply(
    codes: Tensor, sums: Tensor, scales: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    parts: Parts, y: Tensor, tile: Tile, residual: Tensor | None = None,
) -> None:  # fmt: skip
    """Write y [..., O] from codes [T, 4, B] int8 in planes, sums [parts of a token, T] int32 and scales [T] fp32.

    A residual like y is added before y is rounded.
    """
    (tokens, _, row_bytes), rows = codes.shape, len(weight)
    overlap = _overlap(codes.device)
    epilogue = {
        "ENDS": tuple(accumulate(parts)), "SUMS": len(sums), "OVERLAPS": overlap, "enable_fp_fusion": False,
        **({"launch_pdl": True} if overlap else {}),
    }  # fmt: skip
    bias, residual = (None if one is None else one.contiguous() for one in (bias, residual))
    rest = (y, sums, scales, scale.float().contiguous(), bias, residual, tokens, rows)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(tokens, tile.tokens), tile.splits)
    with torch.cuda.device_of(codes):
        if tile.words:
            _multiply_words[grid[:2]](
                codes.view(torch.int32), weight.view(torch.int32), *rest, WORDS=row_bytes // 4, TOKENS=tile.tokens,
                ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps, **epilogue,
            )  # fmt: skip
            return
        partial = y if tile.splits == 1 else y.new_empty(tile.splits, tokens, rows, dtype=torch.int32)
        _multiply_bytes[grid](
            codes, weight.view(torch.int8), partial, *rest, BYTES=row_bytes, TOKENS=tile.tokens, ROWS=tile.rows,
            BLOCK=tile.block, SPLITS=tile.splits, num_warps=tile.warps, num_stages=tile.stages, **epilogue,
        )  # fmt: skip
        if tile.splits > 1:
            grid = (triton.cdiv(rows, FINISHED_ROWS), tokens)
            _finish_splits[grid](partial, *rest, SPLITS=tile.splits, ROWS=FINISHED_ROWS, num_warps=4, **epilogue)


@cache
def _overlap(device: torch.device) -> bool:
    """Whether a launch may begin before the one that it follows has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def _quantize(
    x, codes, sums, scales, width, row_bytes, OVERLAPS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    SMALLEST: tl.constexpr, ROOT: tl.constexpr, BLOCK: tl.constexpr, HOLDS: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Each program finds the scale of its whole token, and rounds its part of it."""
    if OVERLAPS:
        gdc_launch_dependents()
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x, codes = x + token * width, codes + token * 4 * row_bytes
    held = load_block(x, tl.arange(0, BLOCK), width)
    scale = token_scale(held, x, width, SMALLEST, ROOT, BLOCK, HOLDS, INT8)
    if PARTS == 1 and HOLDS:
        total = _store_planes(held, scale, codes, 0, row_bytes, INT8)
    else:
        total = 0
        first = part * PART
        while first < (width if PARTS == 1 else tl.minimum(width, (part + 1) * PART)):
            value = load_block(x, first + tl.arange(0, PART), width)
            total += _store_planes(value, scale, codes, first, row_bytes, INT8)
            first += PART
    tl.store(scales + token, scale)
    tl.store(sums + part * tl.num_programs(0) + token, total)


@triton.jit
def _store_planes(value, scale, codes, first, row_bytes, INT8: tl.constexpr):
    """Codes of columns from `first` on to their planes; their sum."""
    SIZE: tl.constexpr = value.shape[0]
    code = code_of(value, scale, INT8)
    code = tl.where(code == code, code, 0.0).to(tl.int8)  # NaN: its token is NaN by the scale
    byte, plane = first // 4 + tl.arange(0, SIZE // 4)[:, None], tl.arange(0, 4)[None, :]
    tl.store(codes + plane * row_bytes + byte, tl.reshape(code, [SIZE // 4, 4]), mask=byte < row_bytes)
    return tl.sum(code.to(tl.int32), axis=0)


@triton.jit
def _multiply_words(
    codes, weight, y, sums, scales, scale, bias, residual, tokens, rows,
    WORDS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ENDS: tl.constexpr, SUMS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    row, token = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column, is_row, is_token = tl.arange(0, BLOCK), (row < rows)[:, None], (token < tokens)[:, None]
    weight += row[:, None] * WORDS
    codes += token.to(tl.int64)[:, None] * 4 * WORDS
    ahead = tl.load(weight + column[None, :], mask=is_row & (column < WORDS)[None, :], other=0)
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    even = tl.zeros([TOKENS, ROWS, BLOCK // 4], tl.int32)  # planes 0 and 2
    odd = tl.zeros([TOKENS, ROWS, BLOCK // 4], tl.int32)  # planes 1 and 3, four times their sum
    for first in range(0, WORDS, BLOCK):
        word = (first + column)[None, :]
        low = ahead
        following = word + BLOCK
        ahead = tl.load(weight + following, mask=is_row & (following < WORDS), other=0)
        high = low >> 4
        mask = is_token & (word < WORDS)
        even = _add_products(low & 0x03030303, tl.load(codes + word, mask=mask, other=0), even)
        odd = _add_products(low & 0x0C0C0C0C, tl.load(codes + WORDS + word, mask=mask, other=0), odd)
        even = _add_products(high & 0x03030303, tl.load(codes + 2 * WORDS + word, mask=mask, other=0), even)
        odd = _add_products(high & 0x0C0C0C0C, tl.load(codes + 3 * WORDS + word, mask=mask, other=0), odd)
    total = tl.sum(even + (odd >> 2), axis=2)
    _finish(total, y, sums, scales, scale, bias, residual, token, tokens, row, rows, ENDS, SUMS)


@triton.jit
def _add_products(plane, codes, total):
    """total [T, R, G] + the products of plane [R, 4 G] and codes [T, 4 G]: four neighbours, of one thread, into one."""
    plane0, plane1, plane2, plane3 = _quarters(plane)
    codes0, codes1, codes2, codes3 = _quarters(codes)
    total = _dot4(plane0[None, :, :], codes0[:, None, :], total)
    total = _dot4(plane1[None, :, :], codes1[:, None, :], total)
    total = _dot4(plane2[None, :, :], codes2[:, None, :], total)
    return _dot4(plane3[None, :, :], codes3[:, None, :], total)


@triton.jit
def _quarters(words):
    even, odd = tl.split(tl.reshape(words, [words.shape[0], words.shape[1] // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _dot4(a, b, total):
    """total + the product of the four signed bytes of a and those of b."""
    if INTERPRETED:
        for shift in tl.static_range(0, 32, 8):
            total += (a << 24 - shift >> 24) * (b << 24 - shift >> 24)
        return total
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _multiply_bytes(
    codes, weight, partial, y, sums, scales, scale, bias, residual, tokens, rows,
    BYTES: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    ENDS: tl.constexpr, SUMS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    row, token = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2)
    is_row, is_token = (row < rows)[:, None], (token < tokens)[None, :]
    weight += row[:, None] * BYTES
    codes += token.to(tl.int64)[None, :] * 4 * BYTES
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([ROWS, TOKENS], tl.int32)
    STEPS: tl.constexpr = (BYTES + BLOCK * SPLITS - 1) // (BLOCK * SPLITS)
    for step in range(STEPS):
        byte = (split * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        packed = tl.load(weight + byte[None, :], mask=is_row & (byte < BYTES)[None, :], other=0)
        for plane in tl.static_range(4):
            of_plane = codes + plane * BYTES + byte[:, None]
            right = tl.load(of_plane, mask=is_token & (byte < BYTES)[:, None], other=0)
            total = tl.dot(_plane(packed, plane), right, total, out_dtype=tl.int32)
    if SPLITS == 1:
        _finish(tl.trans(total), y, sums, scales, scale, bias, residual, token, tokens, row, rows, ENDS, SUMS)
    else:
        place = (split * tokens + token).to(tl.int64)[None, :] * rows + row[:, None]
        tl.store(partial + place, total, mask=is_row & is_token)


@triton.jit
def _plane(packed, plane: tl.constexpr):
    """Codes + 1 [R, K] int8 of bytes [R, K], four bytes at a time."""
    if INTERPRETED:
        return packed >> 2 * plane & 3
    else:
        return tl.inline_asm_elementwise(
            f"shr.u32 $0, $1, {2 * plane}; and.b32 $0, $0, 0x03030303;",
            "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def _finish_splits(
    partial, y, sums, scales, scale, bias, residual, tokens, rows,
    SPLITS: tl.constexpr, ROWS: tl.constexpr,
    ENDS: tl.constexpr, SUMS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    row, token = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) + tl.arange(0, 1)
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([1, ROWS], tl.int32)
    for split in tl.static_range(SPLITS):
        place = (split * tokens + token).to(tl.int64)[:, None] * rows + row[None, :]
        total += tl.load(partial + place, mask=(row < rows)[None, :], other=0)
    _finish(total, y, sums, scales, scale, bias, residual, token, tokens, row, rows, ENDS, SUMS)


@triton.jit
def _finish(
    total, y, sums, scales, scale, bias, residual, token, tokens, row, rows, ENDS: tl.constexpr, SUMS: tl.constexpr
):  # fmt: skip
    """y of total [T, R], the products of q with codes + 1; part p of a period of rows ends before ENDS[p]."""
    offset = tl.load(sums + token, mask=token < tokens, other=0)
    for i in tl.static_range(1, SUMS):
        offset += tl.load(sums + i * tokens + token, mask=token < tokens, other=0)
    of_token = tl.load(scales + token, mask=token < tokens, other=1.0)[:, None]
    part = tl.zeros_like(row)
    for i in tl.static_range(len(ENDS)):
        part += (row % ENDS[len(ENDS) - 1] >= ENDS[i]).to(tl.int32)
    of_row = tl.load(scale + part)[None, :]
    value = (total - offset[:, None]).to(tl.float32) * tl.div_rn(of_row, of_token)
    if bias is not None:
        value += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    place, is_in = token.to(tl.int64)[:, None] * rows + row[None, :], (token < tokens)[:, None] & (row < rows)[None, :]
    if residual is not None:
        value += tl.load(residual + place, mask=is_in, other=0.0).to(tl.float32)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=is_in)
