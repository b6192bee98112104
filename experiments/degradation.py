"""What the tables ask of the results: perplexities by seed, and how much worse a pattern is than the dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from experiments.results import Result, Results
from experiments.settings import Run, Scale, dense
from experiments.statistics import Comparison, compare, holm
from experiments.tables import MAKE, chosen_rate

Ask = Callable[[int, float], Run]  # seed, rate -> run


@dataclass(frozen=True)
class Degradation:
    """One pattern in both precisions: perplexities over dense, by seed, empty where not run; p after Holm."""

    pattern: str
    ratios: dict[str, list[float]]
    comparison: Comparison | None
    p: float | None


def perplexities(scale: Scale, results: Results, values: str, ask: Ask) -> dict[int, float]:
    """Seed -> test perplexity of the runs that `ask` makes at the rate chosen for `values`; those that are done."""
    rate = chosen_rate(scale, results, values)
    if rate is None:
        return {}
    found = {seed: results.perplexity(ask(seed, rate)) for seed in scale.seeds}
    return {seed: perplexity for seed, perplexity in found.items() if perplexity is not None}


def by_pattern(scale: Scale, results: Results, size: str, values: str, pattern: str) -> dict[int, float]:
    """Seed -> test perplexity of a pattern by the paper's method, or dense."""
    return perplexities(scale, results, values, lambda seed, rate: MAKE[values](scale, size, pattern, seed, rate))


def first_run(scale: Scale, results: Results, size: str, values: str, pattern: str) -> Result | None:
    """That of the first seed, outside the trend, if it is done and did not diverge."""
    rate = chosen_rate(scale, results, values)
    found = None if rate is None else results.of(MAKE[values](scale, size, pattern, scale.seeds[0], rate))
    return None if found is None or found["diverged_at"] is not None else found


def over(one: dict[int, float], base: dict[int, float]) -> list[float]:
    """`one` over `base`, of the seeds that both have."""
    return [one[seed] / base[seed] for seed in sorted(one.keys() & base.keys())]


def degradations(scale: Scale, results: Results, size: str, patterns: tuple[str, ...]) -> list[Degradation]:
    """Each pattern but the dense one against its own dense model, and BF16 against ternary."""
    rows = []
    for pattern in patterns:
        if pattern == dense(pattern):
            continue
        ratios = {
            values: over(
                by_pattern(scale, results, size, values, pattern),
                by_pattern(scale, results, size, values, dense(pattern)),
            )
            for values in MAKE
        }
        rows.append((pattern, ratios, compare(ratios["full"], ratios["ternary"])))
    adjusted = iter(holm([comparison.p for _, _, comparison in rows if comparison is not None]))
    return [
        Degradation(pattern, ratios, comparison, None if comparison is None else next(adjusted))
        for pattern, ratios, comparison in rows
    ]
