"""Many latent weights -> scales and effective weights on a GPU, in three launches, whatever their number.

1. |weight| is summed by tile, in fp64; 2. the tiles of each scale are added up and the scale rounded to fp32;
3. each group of m is ranked, rounded and written. A weight is so read twice and its effective weight written once.
Where the recipe ranks by codes or scales what it keeps, launches 1 and 2 come once more.

A segment is a run of whole rows that share a scale: a weight, one of its parts, an expert. Groups never straddle rows,
so a segment is a run of groups, cut into tiles. Shapes: S segments, P scales of all weights, C tiles, m weights a
group, M the power of two that holds them.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bitnet.kernels import triton_device
from sparse_bitnet.numerics.ternary import SMALLEST_SCALE, Parts
from sparse_bitnet.recipe import Recipe

TILE = 8192  # weights a tile, padding included
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTPUT_DTYPES = (*WEIGHT_DTYPES, torch.int8)
obstacle = triton_device.obstacle


def supports(
    weights: Sequence[Tensor], recipe: Recipe, parts: Sequence[Parts], out: Sequence[Tensor], scale: Tensor
) -> str | None:
    for weight, target in zip(weights, out, strict=True):
        if not triton_device.is_within_reach(weight):
            return f"the weight is on {weight.device.type}"
        if weight.dtype not in WEIGHT_DTYPES or weight.dtype != weights[0].dtype:
            return f"weights of {weight.dtype}; it takes {', '.join(map(str, WEIGHT_DTYPES))}, all of one kind"
        if target.dtype not in OUTPUT_DTYPES:
            return f"an effective weight of {target.dtype}; it gives {', '.join(map(str, OUTPUT_DTYPES))}"
        if not (weight.is_contiguous() and target.is_contiguous()):
            return "the weight is not contiguous"
        if weight.device != weights[0].device:
            return "the weights are on several devices"
    return None


def run(
    weights: Sequence[Tensor], recipe: Recipe, parts: Sequence[Parts], out: Sequence[Tensor], scale: Tensor
) -> None:
    if not any(weight.numel() for weight in weights):
        return
    segments = _segments(weights, recipe, parts, out)
    n, m = recipe.pattern.n, recipe.pattern.m
    width = segments.width
    settings = {
        "n": n, "m": m, "M": width, "GROUPS": segments.groups_a_tile, "COLUMN": _columns_by_halving(width),
        "ALIGNED": segments.aligned, "BY_CODES": recipe.mask_from == "quantized", "num_warps": 16 if width <= 8 else 8,
    }  # fmt: skip
    dense = scale if recipe.order == "quant-then-mask" else torch.empty_like(scale)
    with torch.cuda.device_of(weights[0]):
        if recipe.values == "ternary" and (recipe.order == "quant-then-mask" or recipe.mask_from == "quantized"):
            _write_scales(weights, segments, segments.weights, dense, dense, settings, kept=False)
        if recipe.values == "sign":
            _write_scales(weights, segments, segments.weights // m * n, dense, scale, settings, kept=True)
        elif recipe.order == "mask-then-quant":
            _write_scales(weights, segments, segments.weights, dense, scale, settings, kept=True)
        _write_effective_weights[(segments.tiles,)](
            weights[0], out[0], dense, scale, segments.table, segments.segment_of_tile,
            VALUES=recipe.values, CODES=out[0].dtype == torch.int8, **settings,
        )  # fmt: skip


def _write_scales(
    weights: Sequence[Tensor],
    segments: _Segments,
    counts: Tensor,
    dense: Tensor,
    scale: Tensor,
    settings: dict[str, Any],
    kept: bool,
) -> None:
    """`scale` [P] of all weights, or of those that the mask keeps, ranked by what `dense` [P] makes of them."""
    sums = torch.empty(segments.tiles, dtype=torch.float64, device=scale.device)  # [C]
    grid = (segments.tiles,)
    _sum_tiles[grid](weights[0], sums, dense, segments.table, segments.segment_of_tile, KEPT=kept, **settings)
    _add_up_scales[(len(scale),)](sums, counts, scale, segments.first_tile_of_scale, SMALLEST_SCALE, BLOCK=1024)


@dataclass(frozen=True)
class _Segments:
    """Where the segments of some weights lie, on their device.

    table                [S, 5] int64: first element of weight and of output from the base pointers, groups, first tile,
                         scale
    segment_of_tile      [C] int32
    first_tile_of_scale  [P + 1] int32; the tiles of a scale follow each other
    weights              [P] int64, how many have the scale
    """

    table: Tensor
    segment_of_tile: Tensor
    first_tile_of_scale: Tensor
    weights: Tensor
    width: int
    groups_a_tile: int
    aligned: bool

    @property
    def tiles(self) -> int:
        return len(self.segment_of_tile)


def _segments(weights: Sequence[Tensor], recipe: Recipe, parts: Sequence[Parts], out: Sequence[Tensor]) -> _Segments:
    """Offsets are counted from the first weight and the first output, so one weight has the same table every time."""
    starts = tuple(_distance(weights[0], weight) for weight in weights)
    targets = tuple(_distance(out[0], target) for target in out)
    shapes = tuple(tuple(weight.shape) for weight in weights)
    return _tabulate(shapes, tuple(map(tuple, parts)), starts, targets, recipe.pattern.m, weights[0].device)


def _distance(base: Tensor, tensor: Tensor) -> int:
    return (tensor.data_ptr() - base.data_ptr()) // base.element_size()


@lru_cache(maxsize=4096)
def _tabulate(
    shapes: tuple[tuple[int, ...], ...],
    parts: tuple[Parts, ...],
    starts: tuple[int, ...],
    targets: tuple[int, ...],
    m: int,
    device: torch.device,
) -> _Segments:
    width = triton.next_power_of_2(m)
    groups_a_tile = TILE // width
    table, segment_of_tile, first_tile_of_scale, counts = [], [], [0], []
    for shape, heights, start, target in zip(shapes, parts, starts, targets, strict=True):
        rows, columns = shape[-2:]
        for expert in range(prod(shape[:-2])):
            for runs in _rows_by_part(rows, heights):
                for first, height in runs:
                    offset, groups = (expert * rows + first) * columns, height * columns // m
                    row = (start + offset, target + offset, groups, len(segment_of_tile), len(counts))
                    segment_of_tile += [len(table)] * triton.cdiv(groups, groups_a_tile)
                    table.append(row)
                first_tile_of_scale.append(len(segment_of_tile))
                counts.append(sum(height for _, height in runs) * columns)
    aligned = all(number % 16 == 0 for row in table for number in (row[0], row[1], row[2] * m))

    def on_device(numbers: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(numbers, dtype=dtype).to(device)

    return _Segments(
        on_device(table, torch.int64),
        on_device(segment_of_tile, torch.int32),
        on_device(first_tile_of_scale, torch.int32),
        on_device(counts, torch.int64),
        width,
        groups_a_tile,
        aligned,
    )


def _rows_by_part(rows: int, parts: Parts) -> list[list[tuple[int, int]]]:
    """For each part its runs of rows, (first, height)."""
    if not parts:
        return [[(0, rows)]]
    ends = list(zip(parts, accumulate(parts), strict=True))
    return [[(period + end - part, part) for period in range(0, rows, sum(parts))] for part, end in ends]


def _columns_by_halving(width: int) -> tuple[int, ...]:
    """The column that `_split` puts at each place: even ones before odd ones, and so on within the halves."""
    columns = tuple(range(width))
    return columns if width <= 2 else tuple(
        part[column] for part in (columns[::2], columns[1::2]) for column in _columns_by_halving(width // 2)
    )  # fmt: skip


@triton.jit
def _split(x, GROUPS: tl.constexpr, M: tl.constexpr):
    """[GROUPS, M] -> its M columns [GROUPS], which so lie in registers of one thread, in the order of COLUMN."""
    if M == 1:
        return (tl.reshape(x, [GROUPS]),)
    else:
        even, odd = tl.split(tl.reshape(x, [GROUPS, M // 2, 2]))
        return _split(even, GROUPS, M // 2) + _split(odd, GROUPS, M // 2)


@triton.jit
def _join(columns, GROUPS: tl.constexpr, M: tl.constexpr):
    """The inverse of `_split`."""
    if M == 1:
        return tl.reshape(columns[0], [GROUPS, 1])
    else:
        even = _join(columns[: M // 2], GROUPS, M // 2)
        odd = _join(columns[M // 2 :], GROUPS, M // 2)
        return tl.reshape(tl.join(even, odd), [GROUPS, M])


@triton.jit
def _ranks(keys, m: tl.constexpr, M: tl.constexpr, COLUMN: tl.constexpr):
    """How many of the group's m keys beat the one at each place; of equal ones the lower column wins.

    Each pair is compared once: who does not win, loses.
    """
    ranks = ()
    for place in tl.static_range(M):
        ranks = ranks + (tl.zeros(keys[0].shape, tl.int32),)
    for one in tl.static_range(M):
        for other in tl.static_range(one + 1, M):
            if COLUMN[one] < m and COLUMN[other] < m:
                if COLUMN[one] < COLUMN[other]:
                    wins = (keys[one] >= keys[other]).to(tl.int32)
                else:
                    wins = (keys[one] > keys[other]).to(tl.int32)
                beaten, beats = ranks[one] + (1 - wins), ranks[other] + wins
                ranks = ranks[:one] + (beaten,) + ranks[one + 1 : other] + (beats,) + ranks[other + 1 :]
    return ranks


@triton.jit
def _load_tile(
    weight, table, segment_of_tile,
    m: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The tile [GROUPS, M] of this program in fp32, its offsets in weight and output, what of it exists, its scale."""
    tile = tl.program_id(0)
    row = table + tl.load(segment_of_tile + tile).to(tl.int64) * 5
    start, target, groups = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    first = (tile - tl.load(row + 3)) * GROUPS
    if ALIGNED:
        start, target = tl.multiple_of(start, 16), tl.multiple_of(target, 16)
    group, column = first + tl.arange(0, GROUPS), tl.arange(0, M)
    within = group[:, None] * m + column[None, :]
    exists = (group < groups)[:, None]
    if M > m:
        exists = exists & (column < m)[None, :]
    tile_weights = tl.load(weight + start + within, mask=exists, other=0.0).to(tl.float32)
    return tile_weights, target + within, exists, tl.load(row + 4)


@triton.jit
def _keys(columns, half, M: tl.constexpr, BY_CODES: tl.constexpr):
    """What ranks a group: the magnitudes, or those of the codes."""
    keys = ()
    for place in tl.static_range(M):
        if BY_CODES:
            keys = keys + ((tl.abs(columns[place]) > half).to(tl.int32),)
        else:
            keys = keys + (tl.abs(columns[place]),)
    return keys


@triton.jit
def _sum_tiles(
    weight, sums, dense_scale, table, segment_of_tile,
    n: tl.constexpr, m: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr, COLUMN: tl.constexpr,
    ALIGNED: tl.constexpr, BY_CODES: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    tile, _, _, scale = _load_tile(weight, table, segment_of_tile, m, M, GROUPS, ALIGNED)
    if KEPT and n < m:
        half = 0.0
        if BY_CODES:
            half = tl.load(dense_scale + scale) * 0.5
        columns = _split(tile, GROUPS, M)
        ranks = _ranks(_keys(columns, half, M, BY_CODES), m, M, COLUMN)
        total = tl.zeros([GROUPS], tl.float64)
        for place in tl.static_range(M):
            if COLUMN[place] < m:
                total += tl.where(ranks[place] < n, tl.abs(columns[place]), 0.0).to(tl.float64)
        tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))
    else:
        total = tl.sum(tl.abs(tile).to(tl.float64), axis=1)
        tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _add_up_scales(sums, counts, scale, first_tile_of_scale, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    part = tl.program_id(0)
    first, end = tl.load(first_tile_of_scale + part), tl.load(first_tile_of_scale + part + 1)
    total = tl.zeros([BLOCK], tl.float64)
    while first < end:
        tile = first + tl.arange(0, BLOCK)
        total += tl.load(sums + tile, mask=tile < end, other=0.0)
        first += BLOCK
    smallest = tl.full([], SMALLEST, tl.float64)
    mean = tl.sum(total, axis=0) / tl.load(counts + part).to(tl.float64)
    tl.store(scale + part, tl.where(mean < smallest, smallest, mean).to(tl.float32))


@triton.jit
def _write_effective_weights(
    weight, out, dense_scale, scale, table, segment_of_tile,
    n: tl.constexpr, m: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr, COLUMN: tl.constexpr,
    ALIGNED: tl.constexpr, BY_CODES: tl.constexpr, VALUES: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """|weight| / scale rounds to 1 and not to 0 exactly where |weight| > scale / 2, in fp32 too: no division."""
    tile, target, exists, part = _load_tile(weight, table, segment_of_tile, m, M, GROUPS, ALIGNED)
    half, half_dense, one = 0.0, 0.0, 1.0
    if VALUES != "full":
        half = tl.load(scale + part) * 0.5
        if not CODES:
            one = tl.load(scale + part)
    if BY_CODES:
        half_dense = tl.load(dense_scale + part) * 0.5
    if VALUES == "full":
        value = tile
    elif VALUES == "sign":
        value = tl.where(tile < 0, -one, one)
    else:
        value = tl.where(tl.abs(tile) > half, tl.where(tile > 0, one, -one), 0.0)
    value = value.to(out.dtype.element_ty)
    if n < m:
        ranks = _ranks(_keys(_split(tile, GROUPS, M), half_dense, M, BY_CODES), m, M, COLUMN)
        values, kept = _split(value, GROUPS, M), ()
        for place in tl.static_range(M):
            kept = kept + (tl.where(ranks[place] < n, values[place], tl.zeros_like(values[place])),)
        value = _join(kept, GROUPS, M)
    tl.store(out + target, value, mask=exists)
