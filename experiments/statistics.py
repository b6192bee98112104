"""Is the ternary degradation smaller? Ratios a seed, their means and deviations, a test, a correction for many tests.

The degradation of a run is the perplexity of its pattern over that of the dense model of the same precision and seed.
Tests and intervals are on its logarithm, so that 1.05 and 1 / 1.05 are as far from 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import nct, ttest_ind
from scipy.stats import t as student_t

CONFIDENCE = 0.95
LEVEL = 0.05
POWER = 0.8
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Mean:
    """Mean over seeds, and standard deviation; None for one seed."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Comparison:
    """How much larger one degradation is than another: their ratio, its interval, and the one-sided p of its test."""

    ratio: float
    low: float
    high: float
    p: float


def mean(values: Sequence[float]) -> Mean:
    return Mean(fmean(values), stdev(values) if len(values) > 1 else None)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of the mean of positive values, on their logarithms; None for one value."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    logs = [math.log(value) for value in values]
    half = student_t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return math.exp(fmean(logs) - half), math.exp(fmean(logs) + half)


def compare(larger: Sequence[float], smaller: Sequence[float]) -> Comparison | None:
    """Welch's t-test, one-sided, of whether `larger` is larger than `smaller`; None below two finite values each.

    Not paired: a seed fixes data order and initial weights, but two precisions part within a few steps.
    """
    if min(len(larger), len(smaller)) < 2 or not all(map(math.isfinite, [*larger, *smaller])):
        return None
    one, other = [math.log(value) for value in larger], [math.log(value) for value in smaller]
    two_sided: Any = ttest_ind(one, other, equal_var=False)
    one_sided: Any = ttest_ind(one, other, equal_var=False, alternative="greater")
    within = two_sided.confidence_interval(CONFIDENCE)
    ratio = math.exp(fmean(one) - fmean(other))
    return Comparison(ratio, math.exp(within.low), math.exp(within.high), float(one_sided.pvalue))


def seeds_that_tell(ratio: float, larger: Sequence[float], smaller: Sequence[float], level: float) -> int | None:
    """Seeds each with which Welch's test, one-sided at `level`, would find so large a ratio four times of five.

    As if the deviations of the logarithms were known to be those of these values, of which few tell little. None where
    the ratio is not above 1, below two finite values each, and where a thousand seeds would not do.
    """
    if ratio <= 1 or compare(larger, smaller) is None:
        return None
    variances = [stdev(map(math.log, values)) ** 2 for values in (larger, smaller)]
    share = sum(variances) ** 2 / sum(variance**2 for variance in variances)  # Welch-Satterthwaite, seeds alike
    for seeds in range(2, MOST_SEEDS + 1):
        freedom, shift = share * (seeds - 1), math.log(ratio) / math.sqrt(sum(variances) / seeds)
        if nct.sf(student_t.isf(level, freedom), freedom, shift) >= POWER:
            return seeds
    return None


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that all that lie below a level do so together (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def codes_bits(n: int, m: int, values: str) -> float:
    """Bits a weight that any code needs at least, all groups being as likely: log2 of their number, over m.

    sign: which n of m are kept, and their signs; ternary: which are not 0, at most n, and their signs.
    """
    kept = [n] if values == "sign" else range(n + 1)
    return math.log2(sum(math.comb(m, k) * 2**k for k in kept)) / m
