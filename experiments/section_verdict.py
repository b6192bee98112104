"""The report's answer: each claim of the paper beside what was found, with a verdict that a rule gives."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from experiments import paper
from experiments.degradation import (
    BETTER,
    DIVERGED,
    LESS,
    MORE,
    WORSE,
    Ablation,
    Degradation,
    ablations,
    degradations,
    first_run,
    natural_zeros,
)
from experiments.results import Results
from experiments.settings import Scale
from experiments.statistics import LEVEL, interval
from experiments.tables import ABLATED, DENSE, LARGER, MAKE, PATTERNS
from experiments.wording import NAMES, NOT_YET, ratio_of, table, two_digits, values_of

Range = tuple[float, float]
TOO_FEW = "too few seeds"


def in_short(scale: Scale, results: Results) -> str:
    size = scale.sizes[0]
    rows = degradations(scale, results, size, PATTERNS)
    if all(row.verdict == NOT_YET for row in rows):
        return f"## In short\n\nTable A is {NOT_YET}."
    told = [[row.pattern, *(values_of(row.ratios[values]) for values in MAKE), row.verdict] for row in rows]
    seeds = min(len(row.ratios[values]) for row in rows for values in MAKE)
    return f"""## In short

The degradation by sparsity is {_where(rows)}, of {len(rows)} patterns at {size} weights and
{scale.tokens_a_weight[0]:g} tokens a weight (at least {seeds} seeds). {_how_much(rows)}

Over sizes, by {" and ".join(LARGER[1:])} alone:

{_over_sizes(scale, results)}

{table(["perplexity over dense", "BF16", "ternary", "degradation"], told)}

Smaller: one-sided Welch test of the logarithms, p below {LEVEL} after Holm's correction; larger: the 95 % interval of
the ratio lies below 1, not corrected.

## What reproduces

{table(["the paper says", "there", "here", "verdict"], [*_claims(scale, results, rows), *_changes(scale, results)])}

Each size and ratio of tokens is corrected for its own two patterns, and not for the other rows. A change of the method
is worse where p of Welch's test is below {LEVEL} after Holm's correction, better where the 95 %
interval of the ratio lies below 1, not corrected. In brackets the interval.

What sparsity costs, as perplexity over dense: the paper's figure, the 95 % interval over seeds here, and whether that
holds the paper's (then they are compatible, and so may be others in it), lies below it or above it:

{table(["", *NAMES.values(), "BF16 over ternary"], [_costs(row) for row in rows])}"""


def _claims(scale: Scale, results: Results, rows: list[Degradation]) -> list[list[str]]:
    told = [["sparsity costs ternary less", "at every pattern", _where(rows), _in_all(rows)]]
    for size, of_size in _sizes(scale):
        for row in degradations(of_size, results, size, LARGER):
            claim = f"so it does at {size} weights, {two_digits(of_size.tokens_each(size))} tokens each, {row.pattern}"
            there = "at 0.5 B, 1.5 B, 3 B" if row.pattern == paper.PATTERN else "at 0.5 B"
            here = ", ".join(f"{name} {values_of(row.ratios[values])}" for values, name in NAMES.items())
            told.append([claim, there, here, row.verdict])
    zeros = natural_zeros(scale, results)
    found = _against(paper.ZEROS, interval(zeros), zeros)
    told.append(["zeros among trained ternary weights", f"{paper.ZEROS:.2f}", values_of(zeros), found])
    return [*told, _accuracy(scale, results)]


def _accuracy(scale: Scale, results: Results) -> list[str]:
    """What the paper's pattern adds to the accuracy of the largest model, of the one seed that is asked."""
    gains = []
    for values in MAKE:
        dense, sparse = (first_run(scale, results, scale.sizes[-1], values, one) for one in (DENSE, paper.PATTERN))
        if dense and sparse and dense["zero_shot"]:
            gains.append(100 * (sparse["zero_shot"]["blimp"]["sum"] - dense["zero_shot"]["blimp"]["sum"]))
    there = " / ".join(f"{gain:+.2f}" for gain in paper.ACCURACY)
    told = [f"{paper.PATTERN} costs ternary less accuracy, zero-shot", f"{there} points"]
    if len(gains) < len(MAKE):
        return [*told, NOT_YET, NOT_YET]
    here = " / ".join(f"{gain:+.2f}" for gain in gains)
    return [*told, f"{here} points of BLiMP, one seed", TOO_FEW]


def _changes(scale: Scale, results: Results) -> list[list[str]]:
    found = {pattern: ablations(scale, results, pattern)[1:] for pattern in ABLATED}
    told = []
    for each in zip(*found.values(), strict=True):
        name, there = each[0].name, paper.ABLATIONS.get(each[0].name)
        here = ", ".join(
            f"{pattern} {ratio_of(one.comparison) or NOT_YET}" for pattern, one in zip(found, each, strict=True)
        )
        told.append([f"{name} is worse", "worse" if there is None else f"{there:.3f}", here, _worse(each)])
    return told


def _costs(row: Degradation) -> list[str]:
    told = [row.pattern]
    for values, there in zip(MAKE, paper.DEGRADATIONS[row.pattern], strict=True):
        told.append(_beside(there, interval(row.ratios[values]), row.ratios[values]))
    ratio = row.comparison and (row.comparison.low, row.comparison.high)
    return [*told, _beside(_saved_there(row.pattern), ratio, [one for each in row.ratios.values() for one in each])]


def _beside(there: float, within: Range | None, found: Sequence[float]) -> str:
    here = "" if within is None else f"{within[0]:.3f} to {within[1]:.3f}: "
    return f"{there:.3f}; {here}{_against(there, within, found)}"


def _against(there: float, within: Range | None, found: Sequence[float]) -> str:
    """How what was `found`, and its interval, lies to the paper's figure."""
    if within is None:
        return NOT_YET if not found else TOO_FEW if all(map(isfinite, found)) else DIVERGED
    return "compatible" if within[0] <= there <= within[1] else "below" if within[1] < there else "above"


def _where(rows: list[Degradation]) -> str:
    """`smaller for ternary at 5:8, 3:8`, and where it is larger."""
    if all(row.verdict == NOT_YET for row in rows):
        return NOT_YET
    at = {kind: ", ".join(row.pattern for row in rows if row.verdict == kind) for kind in (LESS, MORE)}
    return f"{LESS} at {at[LESS] or 'no pattern'}" + (f" and larger at {at[MORE]}" if at[MORE] else "")


def _over_sizes(scale: Scale, results: Results) -> str:
    """`4.8m weights, 25 tokens each: smaller for ternary at 4:8`, and so on, as a list."""
    return "\n".join(
        f"* {size} weights, {two_digits(of_size.tokens_each(size))} tokens each: "
        f"{_where(degradations(of_size, results, size, LARGER))}"
        for size, of_size in _sizes(scale)
    )


def _sizes(scale: Scale) -> list[tuple[str, Scale]]:
    """Where the claim is asked again: at larger sizes with as many tokens a weight, and at all sizes of the trend."""
    return [
        *((size, scale) for size in scale.of_one_ratio[1:]),
        *((size, scale.of_trend(size)) for size in scale.sizes),
    ]


def _in_all(rows: list[Degradation]) -> str:
    verdicts = [row.verdict for row in rows]
    for kind in (NOT_YET, DIVERGED):
        if kind in verdicts:
            return f"{kind}, at {verdicts.count(kind)} of {len(rows)}"
    if MORE in verdicts:
        return f"larger for ternary at {verdicts.count(MORE)} of {len(rows)}"
    return "yes" if set(verdicts) == {LESS} else f"yes at {verdicts.count(LESS)} of {len(rows)}, else cannot be told"


def _how_much(rows: list[Degradation]) -> str:
    """By how much, beside the paper."""
    less = [row.pattern for row in rows if row.comparison and row.comparison.high < _saved_there(row.pattern)]
    return f"What ternary weights save is less than in the paper at {', '.join(less)}." if less else ""


def _saved_there(pattern: str) -> float:
    """The paper's degradation of BF16 over that of ternary."""
    bf16, ternary = paper.DEGRADATIONS[pattern]
    return bf16 / ternary


def _worse(each: Sequence[Ablation]) -> str:
    verdicts = [one.verdict for one in each]
    if len(set(verdicts)) == 1:
        return "yes" if verdicts[0] == WORSE else verdicts[0]
    told = [f"{kind} at {verdicts.count(kind)}" for kind in (WORSE, BETTER, NOT_YET, DIVERGED) if kind in verdicts]
    return f"{', '.join(told)} of {len(verdicts)} patterns"
