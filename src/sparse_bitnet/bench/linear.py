"""`bench linear`: the packed linears of a model, one after the other, beside what reading their bytes takes.

Shapes: T tokens, O out_features, I in_features, B bytes a row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_bitnet import _native
from sparse_bitnet.bench.checks import check_packed_linear
from sparse_bitnet.formats import get_format
from sparse_bitnet.kernels.packed_linear import PackedLayout, packed_linear, reference
from sparse_bitnet.kernels.packed_linear.cpu_native import instruction_set, native_arguments
from sparse_bitnet.numerics.nm_mask import nm_mask
from sparse_bitnet.recipe import NMPattern

EVICTING_BYTES = 2**30  # read before each pass, so that no weights are in a cache
PATTERNS = {"g4": "2:4", "g4s2": "2:4", "g4s3": "3:4"}  # that the formats are for; the others hold any


@dataclass(frozen=True)
class LinearBench:
    """What is measured: the linears of a transformer with SwiGLU and grouped-query attention."""

    hidden: int = 1536
    ffn: int = 4096
    kv: int = 256
    layers: int = 24
    formats: tuple[str, ...] = ("i2", "t5", "g4", "g4s3")
    threads: tuple[int, ...] = (1, 2)
    tokens: tuple[int, ...] = (1, 512)
    rounds: int = 9
    seed: int = 0

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """[O, I] of q, k, v, o, gate, up and down."""
        hidden, ffn, kv = self.hidden, self.ffn, self.kv
        return [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), *[(ffn, hidden)] * 2, (hidden, ffn)]


@dataclass
class Linear:
    """One linear of the model, with all that a call needs."""

    weight: Tensor  # [O, B]
    layout: PackedLayout
    x: dict[int, Tensor]  # by T
    y: dict[int, Tensor]


def bench_linear(bench: LinearBench) -> dict[str, Any]:
    """Rows of speeds by format, threads and tokens; ValueError where a kernel is wrong.

    `ms` is of the native calls alone, as a native decoder makes them; `op_ms` of the op, as `PackedLinear` calls it.
    The roof is the time to read the weights, by the same threads, in the same round.
    """
    torch.manual_seed(bench.seed)
    models = {name: _linears(bench, name) for name in bench.formats}
    for linears in models.values():
        for linear in linears[: len(bench.shapes)]:
            check_packed_linear(linear.weight, linear.layout, (1, 3, 33))
    before = torch.get_num_threads()
    try:
        rows = [row for tokens in bench.tokens for row in _rows(bench, models, tokens)]
    finally:
        torch.set_num_threads(before)
    weights = sum(rows * width for rows, width in bench.shapes) * bench.layers
    return {"weights": weights, "instruction_set": instruction_set(), "bench": vars(bench), "linears": rows}


def _rows(bench: LinearBench, models: dict[str, list[Linear]], tokens: int) -> list[dict[str, Any]]:
    seconds: dict[tuple[str, int, str], list[float]] = {}
    others = torch.full((EVICTING_BYTES if tokens == 1 else 0,), 1, dtype=torch.uint8)
    for _ in range(bench.rounds):
        for threads in bench.threads:
            torch.set_num_threads(threads)
            for name, linears in models.items():
                for what, run in _passes(linears, tokens, threads).items():
                    _native.read_bytes(others.data_ptr(), others.nbytes, threads)
                    seconds.setdefault((name, threads, what), []).append(_seconds(run))
    weights = sum(rows * width for rows, width in bench.shapes) * bench.layers
    slow = {threads: _reference_seconds(bench, models[bench.formats[0]], tokens, threads) for threads in bench.threads}
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return [
        {
            "format": name, "bits": get_format(name).bits, "threads": threads, "tokens": tokens,
            "ms": 1e3 * took, "ms_of_rounds": [1e3 * one for one in seconds[name, threads, "native"]],
            "tokens_per_second": tokens / took, "gigaweights_per_second": 1e-9 * weights * tokens / took,
            "bytes": sum(linear.weight.nbytes for linear in models[name]),
            **_roof(median.get((name, threads, "read")), took),
            "times_first": median[bench.formats[0], threads, "native"] / took,
            "op_ms": 1e3 * median[name, threads, "op"], "op_tokens_per_second": tokens / median[name, threads, "op"],
            "reference_ms": 1e3 * slow[threads], "times_reference": slow[threads] / took,
        }
        for threads in bench.threads
        for name in bench.formats
        for took in (median[name, threads, "native"],)
    ]  # fmt: skip


def _roof(read: float | None, took: float) -> dict[str, float]:
    return {} if read is None else {"roof_ms": 1e3 * read, "share_of_roof": read / took}


def _linears(bench: LinearBench, name: str) -> list[Linear]:
    """Random codes that the format holds; the layers hold the same, each in memory of its own."""
    layouts = [PackedLayout(name, width, "int8") for _, width in bench.shapes]
    packed = [get_format(name).pack(random_codes(name, rows, width)) for rows, width in bench.shapes]
    xs = {width: {tokens: torch.randn(tokens, width) for tokens in bench.tokens} for _, width in bench.shapes}
    ys = {rows: {tokens: torch.empty(tokens, rows) for tokens in bench.tokens} for rows, _ in bench.shapes}
    return [
        Linear(weight.clone(), layout, xs[layout.in_features], ys[weight.shape[0]])
        for _ in range(bench.layers)
        for weight, layout in zip(packed, layouts, strict=True)
    ]


def random_codes(name: str, rows: int, width: int) -> Tensor:
    """Codes [O, I] int8: of the format's pattern with signs, or any."""
    if name not in PATTERNS:
        return torch.randint(-1, 2, (rows, width), dtype=torch.int8)
    mask = nm_mask(torch.rand(rows, width), NMPattern.parse(PATTERNS[name]))
    return (torch.randint(2, (rows, width), dtype=torch.int8) * 2 - 1) * mask


def _passes(linears: list[Linear], tokens: int, threads: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name: once through all the linears."""
    scale = torch.ones(1)
    calls = [
        native_arguments(one.x[tokens], one.weight, scale, None, None, one.layout, one.y[tokens]) for one in linears
    ]
    reads = [(one.weight.data_ptr(), one.weight.nbytes) for one in linears]

    def native() -> None:
        for call in calls:
            _native.packed_linear(*call, threads)

    def op() -> None:
        for one in linears:
            packed_linear(one.x[tokens], one.weight, scale, None, one.layout)

    def read() -> None:
        for address, size in reads:
            _native.read_bytes(address, size, threads)

    passes: dict[str, Callable[[], object]] = {"native": native, "op": op}
    return passes | {"read": read} if tokens == 1 else passes


def _reference_seconds(bench: LinearBench, linears: list[Linear], tokens: int, threads: int) -> float:
    """Of the reference, from one layer: it takes seconds."""
    torch.set_num_threads(threads)
    layer = linears[: len(bench.shapes)]

    def run() -> None:
        for one in layer:
            reference.run(one.x[tokens], one.weight, torch.ones(1), None, one.layout)

    return _seconds(run) * bench.layers


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
