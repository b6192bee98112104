"""Several that are timed in turn: none is favoured by its place, and a long one is run less often."""

from __future__ import annotations

from functools import partial
from itertools import groupby

import pytest
import torch

from sparse_bitnet.kernels import timing
from sparse_bitnet.kernels.timing import FEWEST, milliseconds_in_turn


class Clock:
    """Stands still but for `wait`."""

    seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def wait(self, milliseconds: float) -> None:
        self.seconds += milliseconds / 1e3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_all_are_timed_forwards_and_then_backwards(clock: Clock) -> None:
    order: list[float] = []

    def run(milliseconds: float) -> None:
        order.append(milliseconds)
        clock.wait(milliseconds)

    runs = [partial(run, each) for each in (2.0, 20.0, 70.0)]
    assert milliseconds_in_turn(runs, 10, torch.device("cpu"), longest=101) == pytest.approx([2, 20, 70])
    assert [(name, len(list(group))) for name, group in groupby(order)] == [
        (2, 1 + 10),
        (20, 1 + 5),
        (70, 2 * (1 + FEWEST)),
        (20, 1 + 5),
        (2, 1 + 10),
    ]


def test_the_mean_takes_a_drift_away(clock: Clock) -> None:
    """Each run takes a little longer than the one before: equal ones come out equal."""
    taken = 1.0

    def run() -> None:
        nonlocal taken
        taken += 0.01
        clock.wait(taken)

    one, other = milliseconds_in_turn([run, run], 4, torch.device("cpu"), longest=1e9)
    assert one == pytest.approx(other)
