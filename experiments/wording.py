"""How numbers are told in the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

from experiments.statistics import Comparison, interval, mean

NOT_YET = "not run yet"
NAMES = {"full": "BF16", "ternary": "ternary"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def two_digits(value: float) -> str:
    """100, 67, 5.6."""
    return f"{float(f'{value:.2g}'):g}"


def values_of(found: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    if not found:
        return NOT_YET
    if lost := sum(not isfinite(value) for value in found):
        return f"diverged, {lost} of {len(found)}"
    one = mean(found)
    told = f"{one.mean:.{digits}f}"
    return told if one.deviation is None else f"{told} ± {one.deviation:.{digits}f}"


def with_interval(found: Sequence[float]) -> str:
    """Mean ± standard deviation, and the 95 % interval of the mean where there are seeds enough."""
    within = interval(found)
    return values_of(found) if within is None else f"{values_of(found)} ({within[0]:.3f} to {within[1]:.3f})"


def ratio_of(comparison: Comparison | None) -> str:
    """With its 95 % interval; nothing where there is none."""
    return "" if comparison is None else f"{comparison.ratio:.3f} ({comparison.low:.3f} to {comparison.high:.3f})"


def p_value(p: float | None) -> str:
    """For people; nothing where there is none."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
