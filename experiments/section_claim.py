"""Table A in the report: does sparsity cost ternary models less?"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.degradation import Degradation, by_pattern, degradations
from experiments.results import Results
from experiments.settings import Scale
from experiments.statistics import interval
from experiments.tables import (
    LARGER,
    MAKE,
    PATTERNS,
    chosen_rate,
)  # fmt: skip
from experiments.wording import NAMES, p_value, table, values_of

PAPER_TABLE = {
    "7:8": (1.02, 1.01), "6:8": (1.05, 1.01), "5:8": (1.07, 1.03), "4:8": (1.19, 1.06), "3:8": (1.31, 1.15),
    "2:8": (1.45, 1.27),
}  # fmt: skip
"""arXiv 2603.05168, 0.5 B: perplexity over dense, BF16 and ternary."""


def table_a(scale: Scale, results: Results) -> str:
    return f"""## Table A: the claim, {scale.sizes[0]}

{_degradation_table(scale, results, scale.sizes[0], PATTERNS)}

"BF16 over ternary" is the ratio of the two degradations, with its 95 % interval; p is one-sided, after Holm's
correction over the patterns of the table. The paper's column is for 0.5 B and 50 B tokens."""


def larger_sizes(scale: Scale, results: Results) -> str:
    if len(scale.sizes) == 1:
        return "## Table A at larger sizes\n\nThis scale has one size."
    parts = ["## Table A at larger sizes"]
    for size in scale.sizes[1:]:
        parts.append(f"### {size}\n\n{_degradation_table(scale, results, size, LARGER)}")
    header = ["over dense", *(f"{name} {pattern}" for pattern in LARGER[1:] for name in NAMES.values())]
    rows = []
    for size in scale.sizes:
        each = {row.pattern: row for row in degradations(scale, results, size, LARGER)}
        rows.append([size, *(values_of(each[pattern].ratios[values]) for pattern in LARGER[1:] for values in MAKE)])
    parts.append(f"### The trend\n\n{table(header, rows)}")
    parts.append(f"### Zero-shot, {scale.sizes[-1]}\n\n{_zero_shot(scale, results)}")
    return "\n\n".join(parts)


def _degradation_table(scale: Scale, results: Results, size: str, patterns: tuple[str, ...]) -> str:
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
    published = " / ".join(f"{value:.2f}" for value in PAPER_TABLE[row.pattern])
    if row.comparison is None:
        return [*told, "", "", published]
    one = row.comparison
    return [*told, f"{one.ratio:.3f} ({one.low:.3f} to {one.high:.3f})", p_value(row.p), published]


def _with_interval(found: Sequence[float]) -> str:
    within = interval(found)
    return values_of(found) if within is None else f"{values_of(found)} ({within[0]:.3f} to {within[1]:.3f})"


def _zero_shot(scale: Scale, results: Results) -> str:
    rows = []
    for values, name in NAMES.items():
        rate = chosen_rate(scale, results, values)
        for pattern in LARGER:
            made = [] if rate is None else [MAKE[values](scale, scale.sizes[-1], pattern, s, rate) for s in scale.seeds]
            answers = [result["zero_shot"] for run in made if (result := results.of(run)) and "zero_shot" in result]
            blimp = [100 * answer["blimp"]["sum"] for answer in answers]
            hellaswag = [100 * answer["hellaswag"]["by_character"] for answer in answers]
            rows.append([name, pattern, values_of(blimp, 2), values_of(hellaswag, 2)])
    header = ["precision", "pattern", "BLiMP, % (chance 50)", "HellaSwag, % by character (chance 25)"]
    return table(header, rows)
