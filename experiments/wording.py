"""How numbers are told in the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from experiments.statistics import mean

NOT_YET = "not run yet"
NAMES = {"full": "BF16", "ternary": "ternary"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def values_of(found: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    if not found:
        return NOT_YET
    one = mean(found)
    told = f"{one.mean:.{digits}f}"
    return told if one.deviation is None else f"{told} ± {one.deviation:.{digits}f}"


def p_value(p: float | None) -> str:
    """For people; nothing where there is none."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
