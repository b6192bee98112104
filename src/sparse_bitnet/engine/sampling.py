"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

LARGEST_TOP_K = 2**31 - 1
LEAST_PENALTY, LARGEST_PENALTY = 0.01, 100.0
SEEDS = range(-(2**63), 2**64)  # what torch takes


@dataclass(frozen=True)
class Sampling:
    """In the order in which they apply, as in transformers.

    repetition_penalty  logits of tokens that were there are divided by it, or multiplied where negative
    temperature         0 always takes the likeliest token
    top_k               only the likeliest so many; 0 is no limit
    top_p               only the likeliest that together have this probability
    seed                the same seed gives the same tokens, however many sequences there are beside
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 or more")
        if not 0 <= self.top_k <= LARGEST_TOP_K:
            raise ValueError(f"top_k={self.top_k} must lie from 0 to {LARGEST_TOP_K}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie above 0 and be at most 1")
        if not LEAST_PENALTY <= self.repetition_penalty <= LARGEST_PENALTY:
            between = f"from {LEAST_PENALTY} to {LARGEST_PENALTY}"
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must lie {between}")
        if self.seed is not None and self.seed not in SEEDS:
            raise ValueError(f"seed={self.seed} must lie from {SEEDS.start} to {SEEDS.stop - 1}")

    def random(self) -> Random:
        """The random numbers of one sequence."""
        return Random(None if self.seed is None else self.seed % 2**64)  # of a negative one Random takes the magnitude
