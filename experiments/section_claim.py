"""Table A in the report: does sparsity cost ternary models less?"""

from __future__ import annotations

from experiments import paper
from experiments.degradation import Degradation, by_pattern, degradations
from experiments.results import Results
from experiments.settings import Scale
from experiments.tables import MAKE, PATTERNS
from experiments.wording import NAMES, p_value, ratio_of, table, values_of, with_interval


def table_a(scale: Scale, results: Results) -> str:
    return f"""## Table A: the claim, {scale.sizes[0]}

{degradation_table(scale, results, scale.sizes[0], PATTERNS)}

In brackets 95 % intervals. "BF16 over ternary" is the ratio of the two degradations, "seeds" are those of BF16 and of
ternary; p is of the one-sided test of whether ternary's is smaller, after Holm's correction over the patterns of the
table. Its rows divide by the same dense models, so they are not independent of each other. The paper's column is for
0.5 B and 50 B tokens; its figures, here and elsewhere, are from public summaries and the authors' repository."""


def degradation_table(scale: Scale, results: Results, size: str, patterns: tuple[str, ...]) -> str:
    """A row a pattern: perplexities of both precisions, over dense, and the test of whether ternary loses less."""
    rows = {row.pattern: row for row in degradations(scale, results, size, patterns)}
    lines = []
    for pattern in patterns:
        seen = [list(by_pattern(scale, results, size, values, pattern).values()) for values in MAKE]
        told = [" / ".join(str(len(found)) for found in seen), *(values_of(found, 2) for found in seen)]
        lines.append([pattern, *told, *(_compared(rows[pattern]) if pattern in rows else ["1", "1", "", "", ""])])
    names = ["pattern", "seeds", *NAMES.values(), *(f"{name} over dense" for name in NAMES.values())]
    return table([*names, "BF16 over ternary", "p", "paper"], lines)


def _compared(row: Degradation) -> list[str]:
    told = [with_interval(row.ratios[values]) for values in MAKE]
    published = " / ".join(f"{value:.2f}" for value in paper.DEGRADATIONS[row.pattern])
    return [*told, ratio_of(row.comparison), p_value(row.p), published]
