"""What the charts and tables show, as numbers: pure functions of the runs.

Shapes: L layers, C columns of a map, K moments, B bins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

import numpy as np

from sparse_bitnet.report.runs import LogEvent, Moment, Run
from sparse_bitnet.training.run_log import HISTOGRAM_BINS, HISTOGRAM_REACH

END = 0.05  # of the steps: what "at the end" is a mean over
POINTS, COLUMNS = 500, 100  # at most, in a curve and in a map; beyond, means over as many log events as it takes


def curve(run: Run, field: str, points: int = POINTS) -> tuple[list[int], list[float]]:
    """Steps and values of a field of the log events that have it, in at most `points` points."""
    blocks = _blocks(_logged(run, field), points)
    return [block[-1][0] for block in blocks], [fmean(value for _, value in block) for block in blocks]


def at_the_end(run: Run, field: str) -> float | None:
    """Mean of a field over the log events of the last 5 % of the steps done; None where it is not logged."""
    last = run.events[-1].step if run.events else 0
    found = [value for step, value in _logged(run, field) if step > (1 - END) * last]
    return fmean(found) if found else None


def _logged(run: Run, field: str) -> list[tuple[int, float]]:
    """Steps and values of a field; without the flip rate across a change of pattern, when the mask flips at once."""
    changes = {after.step for before, after in pairwise(run.events) if after.pattern != before.pattern}
    return [
        (event.step, value)
        for event in run.events
        if (value := getattr(event, field)) is not None and not (field == "flip_rate" and event.step in changes)
    ]


def tokens_per_second(run: Run) -> float | None:
    """Median over the log events, so that pauses for validation and between resumed parts do not count."""
    if run.tokens_per_step is None:
        return None
    rates = [
        (after.step - before.step) * run.tokens_per_step / (after.time - before.time)
        for before, after in pairwise(run.events)
        if before.time is not None and after.time is not None and after.time > before.time
    ]
    return median(rates) if rates else None


def log_interval(run: Run) -> int | None:
    """Steps between log events."""
    return run.events[-1].step - run.events[-2].step if len(run.events) > 1 else None


@dataclass(frozen=True)
class LayerMap:
    """`zeros` [L, C] shares; `steps` [C] end of each column; `groups`: kinds of layers and their rows, downwards."""

    zeros: np.ndarray
    steps: list[int]
    groups: list[tuple[str, int]]
    layers: list[str]


def layer_map(run: Run) -> LayerMap | None:
    """Zeros of every layer over the steps; layers of a kind together, in the order of the model. None: not logged."""
    events = [event for event in run.events if event.layers]
    if not events:
        return None
    groups = layers_by_kind(list(events[0].layers))
    layers = [layer for names in groups.values() for layer in names]
    blocks = _blocks(events, COLUMNS)
    zeros = np.array([[_mean_zeros(block, layer) for block in blocks] for layer in layers])
    rows = [(kind, len(names)) for kind, names in groups.items()]
    return LayerMap(zeros, [block[-1].step for block in blocks], rows, layers)


def _mean_zeros(events: Sequence[LogEvent], layer: str) -> float:
    known = [event.layers[layer].zeros for event in events if layer in event.layers]
    return fmean(known) if known else float("nan")


def layers_by_kind(layers: Sequence[str]) -> dict[str, list[str]]:
    """Names of layers by what is left of them without prefix and numbers: `q_proj`, or as much as tells kinds apart."""
    tails: dict[str, list[str]] = {}
    for layer in layers:
        segments = layer.split(".")
        first = next((index for index, segment in enumerate(segments) if segment.isdigit()), -1)
        tails.setdefault(".".join(part for part in segments[first + 1 :] if not part.isdigit()), []).append(layer)
    lasts = [tail.rpartition(".")[2] for tail in tails]
    kinds = {}
    for tail, names in tails.items():
        last = tail.rpartition(".")[2]
        kinds[last if lasts.count(last) == 1 else tail] = sorted(names, key=_numbers)
    return kinds


def _numbers(layer: str) -> list[int]:
    return [int(number) for number in re.findall(r"(?<=\.)\d+(?=\.)", f".{layer}.")]


def percent(share: float) -> str:
    """With a space that no line breaks at."""
    return f"{100 * share:.2f}\u00a0%"


def bin_edges() -> np.ndarray:
    """Edges [B + 1] of the histograms, in units of the scale."""
    return np.linspace(-HISTOGRAM_REACH, HISTOGRAM_REACH, HISTOGRAM_BINS + 1)


def densities(moment: Moment, layers: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Kept and masked weights [B] of these layers, all by default, in percent of all their weights, a bin."""
    chosen = [moment.layers[name] for name in (layers or moment.layers) if name in moment.layers]
    kept = np.sum([layer.kept for layer in chosen], axis=0)
    masked = np.sum([layer.masked for layer in chosen], axis=0)
    total = max(int(kept.sum() + masked.sum()), 1)
    return 100 * kept / total, 100 * masked / total


def density_over_time(run: Run) -> np.ndarray:
    """Weights [B, K] in percent a bin, kept or not, at each moment."""
    return np.stack([np.sum(densities(moment), axis=0) for moment in run.moments], axis=1)


def ternary_weights(run: Run) -> int | None:
    """Number of weights in the layers that the histograms count."""
    if not run.moments:
        return None
    return sum(sum(layer.kept) + sum(layer.masked) for layer in run.moments[-1].layers.values())


def _blocks(items: Sequence, at_most: int) -> list[Sequence]:
    """`items` cut into at most so many runs of equal length, the last perhaps shorter."""
    length = -(-len(items) // at_most)
    return [items[start : start + length] for start in range(0, len(items), length or 1)]
