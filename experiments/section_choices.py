"""Tables B and C in the report: what each choice of the method is worth, and what a bit buys."""

from __future__ import annotations

from statistics import fmean

from experiments import frontier
from experiments.degradation import by_pattern, over, perplexities
from experiments.results import Results
from experiments.settings import Scale, ternary, turning_sparse
from experiments.statistics import compare, holm
from experiments.tables import (
    ABLATED,
    ABLATIONS,
    TURNS,
)  # fmt: skip
from experiments.wording import NOT_YET, p_value, table, values_of

PAPER_ABLATIONS = {
    "mask from the quantised weights": 32.23 / 26.31, "dense until 25 %": 27.48 / 26.31,
    "dense until 50 %": 27.39 / 26.31, "dense until 75 %": 26.71 / 26.31,
}  # fmt: skip
"""arXiv 2603.05168, 0.5 B at 6:8: perplexity over that of the method."""


def table_b(scale: Scale, results: Results) -> str:
    size, parts = scale.sizes[0], [f"## Table B: ablations, ternary, {scale.sizes[0]}"]
    for pattern in ABLATED:
        base = by_pattern(scale, results, size, "ternary", pattern)
        asked = {name: _ablated(scale, results, pattern, change) for name, change in ABLATIONS.items()}
        asked |= {f"dense until {100 * at:.0f} %": _turned(scale, results, pattern, at) for at in TURNS}
        tests = {name: compare(list(found.values()), list(base.values())) for name, found in asked.items()}
        tests.pop(next(iter(ABLATIONS)))
        known = {name: test for name, test in tests.items() if test is not None}
        adjusted = dict(zip(known, holm([test.p for test in known.values()]), strict=True))
        rows = []
        for name, found in asked.items():
            published = PAPER_ABLATIONS.get(name) if pattern == "6:8" else None
            rows.append(
                [
                    name,
                    values_of(list(found.values()), 2),
                    values_of(over(found, base)),
                    p_value(adjusted.get(name)),
                    "" if published is None else f"{published:.3f}",
                ]
            )
        header = ["", "perplexity", "over the method", "p that it is not worse", "paper, 0.5 B"]
        parts.append(f"### {pattern}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def table_c(scale: Scale, results: Results) -> str:
    points = frontier.points(scale, results)
    best = {
        name: {point.name for point in frontier.efficient(points, bits)}
        for name, bits in (("stored", frontier.stored_bits), ("least", frontier.least_bits))
    }
    rows = [
        [
            point.name,
            f"{point.stored_bits:g} (`{point.format}`)",
            f"{point.least_bits:.3f}",
            values_of(point.perplexities, 2),
            ", ".join(name for name in best if point.name in best[name]),
        ]
        for point in points
    ]
    return f"""## Table C: what a bit buys, {scale.sizes[0]}

Bits a weight as this package stores them, in the smallest format that fits, and the least that any code could take
(log2 of the number of groups that the recipe allows, over m). Embedding and scales not counted. On the
frontier is what nothing of as few bits, as stored or at least, beats in mean perplexity.

{table(["values, pattern", "stored bits", "least bits", "perplexity", "frontier"], rows)}

{_sherry(scale, points)}"""


def _ablated(scale: Scale, results: Results, pattern: str, change: dict[str, str]) -> dict[int, float]:
    return perplexities(
        scale, results, "ternary", lambda seed, rate: ternary(scale, scale.sizes[0], pattern, seed, rate, **change)
    )


def _turned(scale: Scale, results: Results, pattern: str, at: float) -> dict[int, float]:
    return perplexities(
        scale, results, "ternary", lambda seed, rate: turning_sparse(scale, scale.sizes[0], pattern, seed, rate, at)
    )


def _sherry(scale: Scale, points: list[frontier.Point]) -> str:
    """3:4 with and without the residual, in words."""
    plain, annealed = (
        next(point.perplexities for point in points if point.name == f"sign 3:4{end}") for end in ("", ", residual")
    )
    test = compare(plain, annealed)
    if test is None:
        return f"Sherry with and without its annealed residual: {NOT_YET}."
    return (
        f"Sherry (`sign` 3:4) without its annealed residual has {test.ratio:.3f} times the perplexity that it has "
        f"with it (95 % interval {test.low:.3f} to {test.high:.3f}, {len(plain)} and {len(annealed)} seeds; means "
        f"{fmean(plain):.2f} and {fmean(annealed):.2f})."
    )
