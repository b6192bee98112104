"""Which pattern trains when, and how the weight decay falls: pure functions of the share of steps done."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from sparse_bitnet.recipe import NMPattern


@dataclass(frozen=True)
class PatternSchedule:
    """Patterns by the share of the steps, 0 <= share < 1, from which each is used; the first starts at 0."""

    stages: tuple[tuple[float, NMPattern], ...]

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.stages]
        if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
            raise ValueError(f"stages of a schedule start at 0 and then ever later, not at {starts}")
        if starts[-1] >= 1:
            raise ValueError(f"a stage that starts at {starts[-1]} of the steps is never reached")

    def pattern_at(self, step: int, steps: int) -> NMPattern:
        """The pattern of optimizer step `step`, counted from 0, out of `steps`."""
        return [pattern for start, pattern in self.stages if step >= start * steps][-1]


def sparse_from_start(pattern: NMPattern) -> PatternSchedule:
    """One pattern throughout."""
    return PatternSchedule(((0.0, pattern),))


def dense_to_sparse(pattern: NMPattern, at: float) -> PatternSchedule:
    """Dense until the share `at` of the steps, then `pattern`. (arXiv 2603.05168, the 25 / 50 / 75 % ablation)"""
    return PatternSchedule(((0.0, NMPattern(pattern.m, pattern.m)), (at, pattern)))


def gradual(patterns: list[NMPattern], until: float) -> PatternSchedule:
    """The patterns one after the other in equal stages, the last one from the share `until` of the steps on."""
    if len(patterns) < 2:
        raise ValueError("a gradual schedule needs at least two patterns")
    return PatternSchedule(tuple((until * i / (len(patterns) - 1), pattern) for i, pattern in enumerate(patterns)))


def falling_share(step: int, steps: int, until: float) -> float:
    """1 at step 0, falling in a line to 0 at the share `until` of the steps, 0 from there on."""
    return max(0.0, 1.0 - step / (until * steps))
