"""Statistics against numbers worked out by hand or printed elsewhere."""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest

from experiments.statistics import codes_bits, compare, holm, interval, mean, seeds_that_tell


def test_mean_and_deviation() -> None:
    assert (mean([1.0, 2.0, 3.0]).mean, mean([1.0, 2.0, 3.0]).deviation) == (2, 1)
    assert mean([5.0]).deviation is None


def test_the_interval_is_students_on_logarithms() -> None:
    low, high = interval([math.exp(-0.1), 1.0, math.exp(0.1)])
    assert math.log(high) == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)  # t of 2 degrees of freedom, 97.5 %
    assert low == pytest.approx(1 / high)
    assert interval([1.0]) is None
    assert interval([1.0, float("inf")]) is None


def test_welch_against_a_worked_example() -> None:
    """Deviations 0.01 and 0.02, three seeds each: t = 0.05 / sqrt((1 + 4) 1e-4 / 3), 2.94 degrees of freedom."""
    larger = [math.exp(x) for x in (0.04, 0.05, 0.06)]
    smaller = [math.exp(x) for x in (-0.02, 0.0, 0.02)]
    found = compare(larger, smaller)
    assert found is not None
    assert found.ratio == pytest.approx(math.exp(0.05))
    assert found.p == pytest.approx(0.0157, abs=5e-4)
    assert found.low < math.exp(0.05) < found.high
    reverse = compare(smaller, larger)
    assert reverse is not None and reverse.p == pytest.approx(1 - found.p)
    assert compare([1.0], [1.0, 2.0]) is None


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 4), (4, 4), (6, 8)])
def test_the_least_bits_count_the_groups(n: int, m: int) -> None:
    if m == 4:
        ternary = sum(sum(code != 0 for code in group) <= n for group in product((-1, 0, 1), repeat=m))
        assert codes_bits(n, m, "ternary") == pytest.approx(math.log2(ternary) / m)
    assert codes_bits(n, m, "sign") == pytest.approx((math.log2(len(list(combinations(range(m), n)))) + n) / m)
    assert codes_bits(3, 4, "sign") == 1.25


@pytest.mark.parametrize(("difference", "seeds"), [(0.2, 310), (0.5, 51), (0.8, 21), (1.0, 14)])
def test_seeds_that_tell_a_difference(difference: float, seeds: int) -> None:
    """One-sided at 0.05, power 0.8, differences in deviations: what G*Power tells."""
    values, ratio = [math.exp(x / 100) for x in (-1, 0, 1)], math.exp(difference / 100)
    assert seeds_that_tell(ratio, values, values, 0.05) == seeds
    stricter = seeds_that_tell(ratio, values, values, 0.01)
    assert stricter is not None and stricter > seeds
    assert seeds_that_tell(1.0, values, values, 0.05) is None
    assert seeds_that_tell(ratio, values[:1], values, 0.05) is None
