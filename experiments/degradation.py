"""What the tables ask of the results: perplexities by seed, what a pattern or a change costs, and verdicts on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite, isinf, nan

from experiments.results import Result, Results
from experiments.settings import Scale, dense
from experiments.statistics import LEVEL, Comparison, compare, holm
from experiments.tables import DENSE, MAKE, Ask, changes, chosen_rate
from experiments.wording import NOT_YET

LESS, MORE, UNTOLD = "smaller for ternary", "larger for ternary", "no difference can be told"
WORSE, BETTER = "worse", "better"
DIVERGED = "a run diverged"


@dataclass(frozen=True)
class Degradation:
    """One pattern in both precisions: perplexities over dense, by seed, empty where not run; p after Holm."""

    pattern: str
    ratios: dict[str, list[float]]
    comparison: Comparison | None
    p: float | None

    @property
    def verdict(self) -> str:
        """Whether sparsity costs ternary less, by Welch's test after Holm, or more, by the 95 % interval."""
        return _verdict(self.ratios.values(), self.comparison, self.p, LESS, MORE)


@dataclass(frozen=True)
class Ablation:
    """One choice of the method changed: perplexities by seed, how they compare with the method's; p after Holm."""

    name: str
    perplexities: list[float]
    comparison: Comparison | None
    p: float | None

    @property
    def verdict(self) -> str:
        """Whether it is worse, by Welch's test after Holm, or better, by the 95 % interval."""
        return _verdict([self.perplexities], self.comparison, self.p, WORSE, BETTER)


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


def finished_runs(scale: Scale, results: Results, size: str, values: str, pattern: str) -> dict[int, Result]:
    """Seed -> the run of that pattern; those that are done and did not diverge."""
    rate = chosen_rate(scale, results, values)
    if rate is None:
        return {}
    found = {seed: results.of(MAKE[values](scale, size, pattern, seed, rate)) for seed in scale.seeds}
    return {seed: result for seed, result in found.items() if result and result["diverged_at"] is None}


def first_run(scale: Scale, results: Results, size: str, values: str, pattern: str) -> Result | None:
    """That of the first seed, if it is done and did not diverge."""
    return finished_runs(scale, results, size, values, pattern).get(scale.seeds[0])


def natural_zeros(scale: Scale, results: Results) -> list[float]:
    """Share of zeros among the weights of trained ternary models without a mask, by seed, at the smallest size."""
    found = finished_runs(scale, results, scale.sizes[0], "ternary", DENSE)
    return [result["readings"][-1]["zeros"] for result in found.values()]


def over(one: dict[int, float], base: dict[int, float]) -> list[float]:
    """`one` over `base`, of the seeds that both have; infinite or no number where one of them diverged."""
    return [nan if isinf(base[seed]) else one[seed] / base[seed] for seed in sorted(one.keys() & base.keys())]


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
    adjusted = _adjusted([comparison for _, _, comparison in rows])
    return [Degradation(*row, p=p) for row, p in zip(rows, adjusted, strict=True)]


def ablations(scale: Scale, results: Results, pattern: str) -> list[Ablation]:
    """Each change of the method against it, ternary, at the smallest size; the method first, against nothing."""
    found = {
        name: list(perplexities(scale, results, "ternary", ask).values())
        for name, ask in changes(scale, pattern).items()
    }
    method, *rest = found
    comparisons = [compare(found[name], found[method]) for name in rest]
    rows = zip(rest, comparisons, _adjusted(comparisons), strict=True)
    return [
        Ablation(method, found[method], None, None),
        *(Ablation(name, found[name], comparison, p) for name, comparison, p in rows),
    ]


def _adjusted(comparisons: list[Comparison | None]) -> list[float | None]:
    """Their p after Holm's correction; None where there is nothing to compare."""
    adjusted = iter(holm([one.p for one in comparisons if one is not None]))
    return [None if one is None else next(adjusted) for one in comparisons]


def _verdict(
    found: Iterable[list[float]], comparison: Comparison | None, p: float | None, above: str, below: str
) -> str:
    if any(not isfinite(value) for values in found for value in values):
        return DIVERGED
    if comparison is None or p is None:
        return NOT_YET
    if p < LEVEL:
        return above
    return below if comparison.high < 1 else UNTOLD
