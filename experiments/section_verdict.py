"""The report's answer: each claim of the paper beside what was found, with a verdict that a rule gives."""

from __future__ import annotations

from collections.abc import Sequence

from experiments import paper
from experiments.degradation import Ablation, Degradation, ablations, degradations, natural_zeros
from experiments.results import Results
from experiments.settings import SHAPES, Scale
from experiments.statistics import interval, seeds_that_tell
from experiments.tables import ABLATED, ABLATIONS, LARGER, MAKE, PATTERNS
from experiments.wording import NAMES, NOT_YET, table, values_of

LEVEL = 0.05
SMALLER, GREATER, UNTOLD = "smaller for ternary", "larger for ternary", "no difference can be told"


def in_short(scale: Scale, results: Results) -> str:
    size = scale.sizes[0]
    rows = degradations(scale, results, size, PATTERNS)
    known = [row for row in rows if row.comparison is not None]
    if not known:
        return f"## In short\n\nTable A is {NOT_YET}."
    told = [[row.pattern, *(values_of(row.ratios[values]) for values in MAKE), verdict(row)] for row in known]
    seeds = min(len(row.ratios[values]) for row in known for values in MAKE)
    return f"""## In short

The degradation by sparsity is {_where(known)}, of {len(known)} patterns at {size} weights and
{scale.tokens_a_weight[0]:g} tokens a weight (at least {seeds} seeds).

{table(["perplexity over dense", "BF16", "ternary", "degradation"], told)}

Smaller: one-sided Welch test of the logarithms, p below {LEVEL} after Holm's correction; larger: the 95 % interval of
the ratio lies below 1, not corrected.

## What reproduces

{table(["the paper says", "there", "here", "verdict"], [*_costs(scale, results, rows), *_changes(scale, results)])}

A cost is perplexity over dense, and that of a change over the method. It is as there where its 95 % interval over seeds
holds the paper's figure; a change is worse where p of Welch's test, after Holm's correction, is below {LEVEL}."""


def seeds_to_tell(scale: Scale, results: Results) -> str:
    """A point of a list: the seeds that would tell a difference as large as was seen, where these runs tell none."""
    rows = [row for row in degradations(scale, results, scale.sizes[0], PATTERNS) if verdict(row) != NOT_YET]
    if not rows:
        return f"* More seeds: how many is {NOT_YET}."
    told = []
    for row in rows:
        if verdict(row) == UNTOLD:
            seeds = seeds_that_tell(row.ratios["full"], row.ratios["ternary"], LEVEL / len(rows))
            told.append(f"at {row.pattern} {'no number of seeds' if seeds is None else f'{seeds} seeds'}")
    if not told:
        return "* These seeds tell a difference at every pattern."
    return f"""* Differences as small as some seen: with the deviations seen, four times of five they would be told
  {", ".join(told)} (Welch's test at {LEVEL} / {len(rows)})."""


def verdict(row: Degradation) -> str:
    """Whether sparsity costs ternary less, by Welch's test after Holm, or more, by the interval."""
    if row.comparison is None or row.p is None:
        return NOT_YET
    if row.p < LEVEL:
        return SMALLER
    return GREATER if row.comparison.high < 1 else UNTOLD


def _costs(scale: Scale, results: Results, rows: list[Degradation]) -> list[list[str]]:
    told = [["sparsity costs ternary less", "every pattern", _where(rows), _in_all(rows)]]
    for size in scale.sizes[1:]:
        larger = degradations(scale.of_trend(size), results, size, LARGER)
        tokens = f"{scale.trend_tokens / SHAPES[size].weights:.2g}"
        claim = f"so it does at {size} weights, {tokens} tokens each"
        told.append([claim, "at 1.5 B and 3 B", _where(larger), _in_all(larger)])
    by_pattern = {row.pattern: row.ratios for row in rows}
    for pattern in LARGER[1:]:
        for (values, name), there in zip(NAMES.items(), paper.DEGRADATIONS[pattern], strict=True):
            found = by_pattern[pattern][values]
            told.append([f"{pattern} costs {name}", f"{there:.2f}", values_of(found), _beside(there, found)])
    zeros = natural_zeros(scale, results)
    told.append(
        ["zeros of trained ternary weights", f"{paper.ZEROS:.2f}", values_of(zeros), _beside(paper.ZEROS, zeros)]
    )
    return told


def _changes(scale: Scale, results: Results) -> list[list[str]]:
    found = {pattern: {one.name: one for one in ablations(scale, results, pattern)} for pattern in ABLATED}
    method = next(iter(ABLATIONS))
    told = []
    for name in found[paper.PATTERN]:
        if name != method:
            each = [found[pattern][name] for pattern in ABLATED]
            there = paper.ABLATIONS.get(name)
            here = ", ".join(f"{pattern} {values_of(one.ratios)}" for pattern, one in zip(ABLATED, each, strict=True))
            beside = (
                "" if there is None else f"; at {paper.PATTERN} {_beside(there, found[paper.PATTERN][name].ratios)}"
            )
            told.append([f"{name} is worse", "worse" if there is None else f"{there:.3f}", here, _worse(each) + beside])
    return told


def _where(rows: list[Degradation]) -> str:
    """`smaller for ternary at 5:8, 3:8`, and where it is larger; or that it is not known."""
    verdicts = {row.pattern: verdict(row) for row in rows}
    found = {kind: [pattern for pattern, one in verdicts.items() if one == kind] for kind in (SMALLER, GREATER)}
    if all(one == NOT_YET for one in verdicts.values()):
        return NOT_YET
    told = f"{SMALLER} at {', '.join(found[SMALLER]) or 'no pattern'}"
    return told + (f" and larger at {', '.join(found[GREATER])}" if found[GREATER] else "")


def _in_all(rows: list[Degradation]) -> str:
    verdicts = [verdict(row) for row in rows]
    if NOT_YET in verdicts:
        return NOT_YET
    if GREATER in verdicts:
        return f"not at {verdicts.count(GREATER)} of {len(rows)}"
    return "yes" if set(verdicts) == {SMALLER} else f"at {verdicts.count(SMALLER)} of {len(rows)}, the rest is not told"


def _beside(there: float, found: Sequence[float]) -> str:
    within = interval(found)
    if within is None:
        return NOT_YET
    return (
        "as there" if within[0] <= there <= within[1] else "less than there" if within[1] < there else "more than there"
    )


def _worse(found: list[Ablation]) -> str:
    if any(one.p is None for one in found):
        return NOT_YET
    worse = sum(one.p < LEVEL for one in found if one.p is not None)
    return "yes" if worse == len(found) else f"at {worse} of {len(found)} patterns" if worse else UNTOLD
