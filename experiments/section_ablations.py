"""Table B in the report: what each choice of the method is worth."""

from __future__ import annotations

from experiments import paper
from experiments.degradation import ablations
from experiments.results import Results
from experiments.settings import Scale
from experiments.tables import ABLATED
from experiments.wording import p_value, ratio_of, table, values_of


def table_b(scale: Scale, results: Results) -> str:
    parts = [f"## Table B: ablations, ternary, {scale.sizes[0]}"]
    for pattern in ABLATED:
        rows = []
        for one in ablations(scale, results, pattern):
            published = paper.ABLATIONS.get(one.name) if pattern == paper.PATTERN else None
            rows.append(
                [
                    one.name,
                    values_of(one.perplexities, 2),
                    ratio_of(one.comparison),
                    p_value(one.p),
                    "" if published is None else f"{published:.3f}",
                ]
            )
        header = ["", "perplexity", "over the method (95 %)", "p", "paper, 0.5 B"]
        parts.append(f"### {pattern}\n\n{table(header, rows)}")
    parts.append(
        "Ratios of geometric means, with the interval of Welch's test; p is of the one-sided test of whether the "
        "change is worse,\nafter Holm's correction over the changes at one pattern. Seeds are not paired."
    )
    return "\n\n".join(parts)
