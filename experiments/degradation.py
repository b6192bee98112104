"""What the tables ask of the results: perplexities by seed, and how much worse a pattern is than the dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from experiments.results import Result, Results
from experiments.settings import Run, Scale, dense, ternary, turning_sparse
from experiments.statistics import Comparison, compare, holm
from experiments.tables import ABLATIONS, DENSE, MAKE, TURNS, chosen_rate

Ask = Callable[[int, float], Run]  # seed, rate -> run


@dataclass(frozen=True)
class Degradation:
    """One pattern in both precisions: perplexities over dense, by seed, empty where not run; p after Holm."""

    pattern: str
    ratios: dict[str, list[float]]
    comparison: Comparison | None
    p: float | None


@dataclass(frozen=True)
class Ablation:
    """One choice of the method changed: perplexities by seed, over those of the method; p that it is not worse, after
    Holm. Neither for the method itself."""

    name: str
    perplexities: list[float]
    ratios: list[float]
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


def natural_zeros(scale: Scale, results: Results) -> list[float]:
    """Share of zeros among the weights of trained ternary models without a mask, by seed, at the smallest size."""
    rate = chosen_rate(scale, results, "ternary")
    if rate is None:
        return []
    runs = [ternary(scale, scale.sizes[0], DENSE, seed, rate) for seed in scale.seeds]
    return [found["readings"][-1]["zeros"] for run in runs if (found := results.of(run)) is not None]


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


def ablations(scale: Scale, results: Results, pattern: str) -> list[Ablation]:
    """The method of the paper first, then each change of it, ternary, at the smallest size."""
    size = scale.sizes[0]

    def changed(change: dict[str, str]) -> Ask:
        return lambda seed, rate: ternary(scale, size, pattern, seed, rate, **change)

    def turned(at: float) -> Ask:
        return lambda seed, rate: turning_sparse(scale, size, pattern, seed, rate, at)

    asked = {name: changed(change) for name, change in ABLATIONS.items()}
    asked |= {f"dense until {100 * at:.0f} %": turned(at) for at in TURNS}
    found = {name: perplexities(scale, results, "ternary", ask) for name, ask in asked.items()}
    method, *changes = found
    tests = {name: compare(list(found[name].values()), list(found[method].values())) for name in changes}
    known = {name: test.p for name, test in tests.items() if test is not None}
    adjusted = dict(zip(known, holm(list(known.values())), strict=True))
    return [
        Ablation(name, list(one.values()), over(one, found[method]), adjusted.get(name)) for name, one in found.items()
    ]
