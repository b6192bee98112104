"""Schedules: which pattern and which weight decay at every step."""

from __future__ import annotations

from itertools import pairwise

import pytest

from sparse_bitnet import NMPattern
from sparse_bitnet.training.schedules import (
    PatternSchedule,
    ResidualSchedule,
    dense_to_sparse,
    falling_share,
    gradual,
    sparse_from_start,
)


def stages(schedule: PatternSchedule, steps: int) -> list[str]:
    return [str(schedule.pattern_at(step, steps)) for step in range(steps)]


def test_sparse_from_the_start() -> None:
    assert stages(sparse_from_start(NMPattern(6, 8)), 3) == ["6:8"] * 3


@pytest.mark.parametrize(("at", "dense_steps"), [(0.25, 2), (0.5, 4), (0.75, 6), (0.3, 3)])
def test_dense_to_sparse_switches_at_its_share_of_the_steps(at: float, dense_steps: int) -> None:
    assert stages(dense_to_sparse(NMPattern(2, 4), at), 8) == ["4:4"] * dense_steps + ["2:4"] * (8 - dense_steps)


def test_gradual_stages_are_equally_long_and_the_last_begins_at_its_share() -> None:
    patterns = [NMPattern(8, 8), NMPattern(7, 8), NMPattern(6, 8)]
    assert stages(gradual(patterns, 0.5), 8) == ["8:8"] * 2 + ["7:8"] * 2 + ["6:8"] * 4


@pytest.mark.parametrize("starts", [(0.1,), (0.0, 0.5, 0.5), (0.0, 0.5, 0.2), (0.0, 1.0), ()])
def test_stages_that_are_out_of_order_or_never_reached_are_refused(starts: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="stage"):
        PatternSchedule(tuple((start, NMPattern(6, 8)) for start in starts))


def test_one_pattern_is_not_gradual() -> None:
    with pytest.raises(ValueError, match="at least two"):
        gradual([NMPattern(6, 8)], 0.5)


def test_the_share_falls_in_a_line_and_stays_at_zero() -> None:
    assert [falling_share(step, 8, 0.5) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]


def test_the_residual_rises_falls_and_ends_before_the_steps_do() -> None:
    shares = [ResidualSchedule(peak=2.0, warmup=0.2, until=0.8).share_at(step, 10) for step in range(10)]
    assert shares[:3] == [1, 2, 2]
    assert all(a > b > 0 for a, b in pairwise(shares[2:8]))
    assert shares[8:] == [0, 0]
    assert shares[5] == pytest.approx(1)  # half a cosine is at one half in the middle
    assert ResidualSchedule(warmup=0.0, until=1.0).share_at(0, 10) == 1


@pytest.mark.parametrize("settings", [{"peak": -1.0}, {"warmup": 0.9}, {"until": 1.1}, {"warmup": -0.1}])
def test_a_residual_that_does_not_fit_the_steps_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="residual"):
        ResidualSchedule(**settings)
