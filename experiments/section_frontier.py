"""Table C in the report: what a bit buys."""

from __future__ import annotations

from statistics import fmean

from experiments import frontier
from experiments.results import Results
from experiments.settings import Scale
from experiments.statistics import compare
from experiments.wording import NOT_YET, table, values_of


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
(log2 of the number of groups that the recipe allows, over m). Embedding and scales are not counted. On the frontier is
what nothing of as few bits, as stored or at least, beats in mean perplexity. Means that lie closer than their
deviations may change places with other seeds.

{table(["values, pattern", "stored bits", "least bits", "perplexity", "frontier"], rows)}

{_sherry(points)}"""


def _sherry(points: list[frontier.Point]) -> str:
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
        f"{fmean(plain):.2f} and {fmean(annealed):.2f}). Both have the rate that was chosen for ternary, and the "
        "residual ends at nine tenths of the steps: another rate or end was not tried."
    )
