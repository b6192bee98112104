"""Which pattern trains when, how weight decay and residual fall: pure functions of the share of steps done."""

from __future__ import annotations

import itertools
import math
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


@dataclass(frozen=True)
class ResidualSchedule:
    """How much of the latent weight is added to the effective one: up in a line, down in half a cosine, then none.

    peak    the share at the top; 1 in the authors' code
    warmup  share of the steps at which it is reached
    until   share of the steps from which there is none: what trains from there on is what is exported. The authors'
            code ends with the last step

    (arXiv 2601.07892, "Arenas")
    """

    peak: float = 1.0
    warmup: float = 0.1
    until: float = 0.9

    def __post_init__(self) -> None:
        if self.peak < 0:
            raise ValueError(f"the peak of a residual is a share of the latent weight, not {self.peak}")
        if not 0 <= self.warmup < self.until <= 1:
            raise ValueError(
                f"a residual rises until {self.warmup} of the steps and ends at {self.until}: not in order"
            )

    def share_at(self, step: int, steps: int) -> float:
        """The share at optimizer step `step`, counted from 0, out of `steps`."""
        done = step / steps
        if done >= self.until:
            return 0.0
        if done < self.warmup:
            return self.peak * min(1.0, (step + 1) / (self.warmup * steps))
        return self.peak * (1 + math.cos(math.pi * (done - self.warmup) / (self.until - self.warmup))) / 2


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
