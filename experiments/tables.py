"""A table is a list of runs. Where it depends on earlier results, as on the learning rate, it is a function of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

from experiments.results import Results
from experiments.settings import Run, Scale, full_precision, sign, ternary, turning_sparse

DENSE = "8:8"
PATTERNS = (DENSE, "7:8", "6:8", "5:8", "4:8", "3:8", "2:8")
SWEPT = (DENSE, "6:8")
ABLATED = ("6:8", "4:8")
LARGER = (DENSE, "6:8", "4:8")
ABLATIONS: dict[str, dict[str, str]] = {
    "the paper's method": {},
    "mask from the quantised weights": {"mask_from": "quantized"},
    "mask-then-quant": {"order": "mask-then-quant"},
    "masked gradient": {"gradient": "masked"},
}
TURNS = (0.25, 0.5, 0.75)
SIGNS = (("8:8", 0.0), ("6:8", 0.0), ("3:4", 0.0), ("3:4", 1.0), ("2:4", 0.0))  # pattern, residual
FRONTIER = (
    *(("sign", pattern, residual) for pattern, residual in SIGNS),
    *(("ternary", pattern, 0.0) for pattern in ("3:4", "2:4", *PATTERNS)),
)
NARROWEST, WIDEST = 2.5e-4, 6.4e-2
"""Rates beyond which the sweep does not go, whatever the results."""

MAKE = {"full": full_precision, "ternary": ternary}
Ask = Callable[[int, float], Run]  # seed, rate -> run


def sweep(scale: Scale, results: Results) -> list[Run]:
    """Learning rates for each precision at one size, dense and 6:8, one seed that no other table uses."""
    rates = {values: swept_rates(scale, results, values) for values in MAKE}
    return [run for values in MAKE for rate in rates[values] for run in swept(scale, values, rate)]


def trend_sweep(scale: Scale, results: Results) -> list[Run]:
    """The same for the trend, at every size."""
    return [run for size in scale.sizes for run in sweep(scale.of_trend(size), results)]


def swept_rates(scale: Scale, results: Results, values: str) -> list[float]:
    """The learning rates of the sweep so far, as of the smallest size.

    Each precision gets the rates of the scale. Where the best of them is the lowest or the highest so far, it gets the
    next, half or twice as large, until the best one lies between two others.
    """
    rates = sorted(scale.rates)
    while (best := _best_rate(scale, results, values, rates)) is not None:
        if best == rates[0] and best / 2 >= NARROWEST:
            rates.insert(0, best / 2)
        elif best == rates[-1] and best * 2 <= WIDEST:
            rates.append(best * 2)
        else:
            break
    return rates


def chosen_rate(scale: Scale, results: Results, values: str) -> float | None:
    """The rate with the lowest validation loss, mean of dense and 6:8; None while the sweep is not done."""
    return _best_rate(scale, results, values, swept_rates(scale, results, values))


def swept(scale: Scale, values: str, rate: float) -> list[Run]:
    """The runs that a rate is judged by, one a pattern of SWEPT."""
    size = scale.swept_size or scale.sizes[0]
    return [MAKE[values](scale, size, pattern, scale.sweep_seed, rate) for pattern in SWEPT]


def swept_loss(scale: Scale, results: Results, values: str, rate: float) -> float | None:
    """Validation loss, mean of the patterns that are swept; None where one is not run yet."""
    found = [results.perplexity(run, "valid") for run in swept(scale, values, rate)]
    known = [perplexity for perplexity in found if perplexity is not None]
    return sum(map(math.log, known)) / len(known) if len(known) == len(found) else None


def claim(scale: Scale, results: Results) -> list[Run]:
    """Table A: every pattern of 8, both precisions, at the smallest size."""
    return _both(scale, results, scale.sizes[0], PATTERNS, scale.seeds)


def trend(scale: Scale, results: Results) -> list[Run]:
    """All sizes with as many tokens, so few that no text is read often; the larger, the fewer tokens a weight.

    A seed at all of them before the next seed, so that a trend is seen early.
    """
    return [
        run
        for seed, size in product(scale.seeds, scale.sizes)
        for run in _both(scale.of_trend(size), results, size, LARGER, (seed,))
    ]


def larger(scale: Scale, results: Results) -> list[Run]:
    """The larger sizes for as long as their tokens a weight make it.

    Those of the smallest size's ratio with every seed, as they are Table A again. Others with one: what repeated text
    does.
    """
    seeds = {size: scale.seeds if size in scale.of_one_ratio else scale.seeds[:1] for size in scale.sizes[1:]}
    return [run for size in seeds for run in _both(scale, results, size, LARGER, seeds[size])]


def ablations(scale: Scale, results: Results) -> list[Run]:
    """Table B: one choice of the method changed at a time, and dense-to-sparse."""
    rate = chosen_rate(scale, results, "ternary")
    if rate is None:
        return []
    each = product(scale.seeds, ABLATED)
    return [ask(seed, rate) for seed, pattern in each for ask in changes(scale, pattern).values()]


def changes(scale: Scale, pattern: str) -> dict[str, Ask]:
    """The method of the paper first, then each change of it."""
    size = scale.sizes[0]

    def changed(change: dict[str, str]) -> Ask:
        return lambda seed, rate: ternary(scale, size, pattern, seed, rate, **change)

    def turned(at: float) -> Ask:
        return lambda seed, rate: turning_sparse(scale, size, pattern, seed, rate, at)

    asked = {name: changed(change) for name, change in ABLATIONS.items()}
    return asked | {f"dense until {100 * at:.0f} %": turned(at) for at in TURNS}


def frontier(scale: Scale, results: Results) -> list[Run]:
    """Table C: patterns and values by the bits they cost; the ternary patterns of 8 are those of Table A."""
    rate = chosen_rate(scale, results, "ternary")
    if rate is None:
        return []
    return [on_frontier(scale, *recipe)(seed, rate) for seed, recipe in product(scale.seeds, FRONTIER)]


def on_frontier(scale: Scale, values: str, pattern: str, residual: float) -> Ask:
    """The runs of one of FRONTIER."""
    size = scale.sizes[0]
    if values == "sign":
        return lambda seed, rate: sign(scale, size, pattern, seed, rate, residual)
    return lambda seed, rate: ternary(scale, size, pattern, seed, rate)


TABLES: dict[str, Callable[[Scale, Results], list[Run]]] = {
    "sweep": sweep, "claim": claim, "ablations": ablations, "frontier": frontier, "trend-sweep": trend_sweep,
    "trend": trend, "larger": larger,
}  # fmt: skip
"""In the order of their weight; all but the sweeps wait for the rates that these find."""


def waiting(scale: Scale, results: Results) -> int:
    """How many runs more the trend will ask for, once there are rates for them."""
    return len(scale.seeds) * len(scale.sizes) * len(MAKE) * len(LARGER) - len(trend(scale, results))


def missing(scale: Scale, results: Results, names: list[str]) -> list[Run]:
    """The runs of these tables that have no result, each once, in the order in which they are to be done."""
    runs = [run for name in names for run in TABLES[name](scale, results)]
    return [run for key, run in {run.key: run for run in runs}.items() if key not in results.found]


def _both(
    scale: Scale,
    results: Results,
    size: str,
    patterns: tuple[str, ...],
    seeds: tuple[int, ...],
) -> list[Run]:
    """A whole seed before the next, so that what is cut short is still a table."""
    rates = {values: chosen_rate(scale, results, values) for values in MAKE}
    return [
        MAKE[values](scale, size, pattern, seed, rate)
        for seed, values, pattern in product(seeds, MAKE, patterns)
        if (rate := rates[values]) is not None
    ]


def _best_rate(scale: Scale, results: Results, values: str, rates: list[float]) -> float | None:
    losses = {rate: swept_loss(scale, results, values, rate) for rate in rates}
    if not losses or None in losses.values():
        return None
    return min(losses, key=lambda rate: losses[rate])  # type: ignore[arg-type, return-value]
