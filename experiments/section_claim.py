"""Table A in the report: does sparsity cost ternary models less?"""

from __future__ import annotations

from collections.abc import Sequence

from experiments import paper
from experiments.degradation import Degradation, by_pattern, degradations
from experiments.results import Results
from experiments.settings import Scale
from experiments.statistics import interval
from experiments.tables import MAKE, PATTERNS
from experiments.wording import p_value, table, values_of


def table_a(scale: Scale, results: Results) -> str:
    return f"""## Table A: the claim, {scale.sizes[0]}

{degradation_table(scale, results, scale.sizes[0], PATTERNS)}

"BF16 over ternary" is the ratio of the two degradations, with its 95 % interval; p is one-sided, after Holm's
correction over the patterns of the table. The paper's column is for 0.5 B and 50 B tokens."""


def degradation_table(scale: Scale, results: Results, size: str, patterns: tuple[str, ...]) -> str:
    """A row a pattern: perplexities of both precisions, over dense, and the test of whether ternary loses less."""
    rows = {row.pattern: row for row in degradations(scale, results, size, patterns)}
    lines = []
    for pattern in patterns:
        seen = {values: by_pattern(scale, results, size, values, pattern) for values in MAKE}
        told = [values_of(list(found.values()), 2) for found in seen.values()]
        lines.append([pattern, *told, *(_compared(rows[pattern]) if pattern in rows else ["1", "1", "", "", ""])])
    header = [
        "pattern", "BF16", "ternary", "BF16 over dense", "ternary over dense", "BF16 over ternary", "p", "paper",
    ]  # fmt: skip
    return table(header, lines)


def _compared(row: Degradation) -> list[str]:
    told = [_with_interval(row.ratios[values]) for values in MAKE]
    published = " / ".join(f"{value:.2f}" for value in paper.DEGRADATIONS[row.pattern])
    if row.comparison is None:
        return [*told, "", "", published]
    one = row.comparison
    return [*told, f"{one.ratio:.3f} ({one.low:.3f} to {one.high:.3f})", p_value(row.p), published]


def _with_interval(found: Sequence[float]) -> str:
    within = interval(found)
    return values_of(found) if within is None else f"{values_of(found)} ({within[0]:.3f} to {within[1]:.3f})"
