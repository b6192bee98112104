"""A run is a frozen set of settings; what a paper calls an experiment is a function that returns one.

Everything that could change a result is a field here and is stored with the result, whose file is named by its hash.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparse_bitnet.recipe import NMPattern, Recipe
from sparse_bitnet.training.schedules import PatternSchedule, ResidualSchedule, dense_to_sparse, sparse_from_start


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model, heads of 64 with keys and values of their own, embedding and head tied."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int = 16_384

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        """Of the linear layers, which are made ternary and sparse: without embedding, norms and biases."""
        return self.layers * self.hidden * (4 * self.hidden + 3 * self.ffn)


SHAPES = {
    "toy": Shape(2, 64, 1, 128, 512),
    "1.8m": Shape(4, 192, 3, 512),
    "4.8m": Shape(6, 256, 4, 704),
    "21m": Shape(12, 384, 6, 1024),
}


@dataclass(frozen=True)
class Run:
    """One model, trained once.

    tokens         seen in training, cut to whole steps of `batch` sequences of `sequence` tokens
    dense_until    share of the steps that are dense, before the pattern of the recipe begins
    residual       peak of the annealed residual, 0 for none
    decay_until    share of the steps at which the weight decay, falling in a line, has reached 0; None keeps it. The
                   authors let it fall for ternary runs alone (arXiv 2603.05168)
    zero_shot      whether the finished model answers BLiMP and HellaSwag
    """

    size: str
    recipe: Recipe
    seed: int
    learning_rate: float
    tokens: int
    sequence: int = 256
    batch: int = 512
    dense_until: float = 0.0
    residual: float = 0.0
    decay_until: float | None = None
    weight_decay: float = 0.1
    warmup_steps: int = 100
    final_rate_share: float = 1 / 30
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    zero_shot: bool = False

    @property
    def shape(self) -> Shape:
        return SHAPES[self.size]

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.sequence)

    @property
    def operations(self) -> float:
        """Of its matrix products, forward and backward, attention left out: what its time goes by."""
        return 6.0 * self.tokens * (self.shape.weights + self.shape.embedding)

    def schedule(self) -> PatternSchedule:
        pattern = self.recipe.pattern
        return dense_to_sparse(pattern, self.dense_until) if self.dense_until else sparse_from_start(pattern)

    def residual_schedule(self) -> ResidualSchedule | None:
        return ResidualSchedule(self.residual) if self.residual else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "recipe": self.recipe.to_dict(), "shape": asdict(self.shape)}

    @property
    def key(self) -> str:
        """Ten digits that change with any setting."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """For people, and for the name of the result file."""
        return f"{self.size}-{self.recipe.values}-{str(self.recipe.pattern).replace(':', 'of')}-s{self.seed}-{self.key}"


@dataclass(frozen=True)
class Scale:
    """How large the experiments are: sizes from small to large, and what all of their runs share.

    tokens_a_weight  of each size. The paper trained 0.5 B parameters on about 50 B tokens, 100 a parameter
    trend_tokens     of every size alike, where degradations are compared over sizes
    trend_batch      sequences a step there: fewer, as few tokens would make few steps
    rates            learning rates of the first round of the sweep, as of the smallest size
    swept_size       the size that they are swept at; None for the smallest
    tokens_of_each   of every size alike, instead of so many a weight
    """

    sizes: tuple[str, ...]
    tokens_a_weight: tuple[float, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    trend_tokens: int = 119_000_000
    trend_batch: int = 128
    sequence: int = 256
    batch: int = 512
    warmup_steps: int = 100
    sweep_seed: int = 100  # of no other run: no table holds a run that a rate was chosen by
    swept_size: str | None = None
    tokens_of_each: int | None = None

    def of_trend(self, size: str) -> Scale:
        """The scale of runs of `size` where degradations are compared over sizes: it has rates of its own."""
        return replace(self, swept_size=size, tokens_of_each=self.trend_tokens, batch=self.trend_batch)

    @property
    def of_one_ratio(self) -> tuple[str, ...]:
        """The sizes that get as many tokens a weight as the smallest, which is the first of them."""
        each = dict(zip(self.sizes, self.tokens_a_weight, strict=True))
        return tuple(size for size in self.sizes if each[size] == each[self.sizes[0]])

    def tokens_each(self, size: str) -> float:
        """Tokens of training for each weight of the linear layers."""
        return self.tokens(size) / SHAPES[size].weights

    def tokens(self, size: str) -> int:
        return self.tokens_of_each or int(self.tokens_a_weight[self.sizes.index(size)] * SHAPES[size].weights)


PAPER = Scale(("1.8m", "4.8m", "21m"), (100, 100, 15), (0, 1, 2), (2e-3, 4e-3, 8e-3))
"""At 21 M weights 100 tokens each would be 71 times through the corpus of 30 M tokens; 15 are 11 times. The trend's are
4 times: read that often, text still teaches nearly what as much new text would (arXiv 2305.16264)."""
TOY = Scale(
    ("toy",), (1,), (0, 1), (2e-3, 8e-3), trend_tokens=40_000, trend_batch=8, sequence=64, batch=16, warmup_steps=20
)
"""For a CPU, to see that everything runs and what the report looks like; it shows nothing else."""


def full_precision(scale: Scale, size: str, pattern: str, seed: int, rate: float) -> Run:
    """The BF16 baseline: `nn.Linear`, or the same with a mask."""
    return _run(scale, size, Recipe(pattern, values="full", activations="none"), seed, rate)


def ternary(scale: Scale, size: str, pattern: str, seed: int, rate: float, **ablation: Any) -> Run:
    """The method of the paper; `ablation` changes fields of its recipe."""
    return replace(_run(scale, size, Recipe(pattern, **ablation), seed, rate), decay_until=0.5)


def sign(scale: Scale, size: str, pattern: str, seed: int, rate: float, residual: float = 0.0) -> Run:
    """Kept weights are -1 or +1: 3:4 is Sherry, with its residual if that is 1 (arXiv 2601.07892)."""
    run = ternary(scale, size, pattern, seed, rate, values="sign")
    return replace(run, residual=residual)


def turning_sparse(scale: Scale, size: str, pattern: str, seed: int, rate: float, at: float) -> Run:
    """The method of the paper, dense until the share `at` of the steps."""
    return replace(ternary(scale, size, pattern, seed, rate), dense_until=at)


def dense(pattern: str) -> str:
    """`6:8` -> `8:8`."""
    m = NMPattern.parse(pattern).m
    return f"{m}:{m}"


def _run(scale: Scale, size: str, recipe: Recipe, seed: int, rate: float) -> Run:
    narrowing = SHAPES[scale.sizes[0]].hidden / SHAPES[size].hidden  # the same rule for every precision
    return Run(
        size=size,
        recipe=recipe,
        seed=seed,
        learning_rate=rate * narrowing,
        tokens=scale.tokens(size),
        sequence=scale.sequence,
        batch=scale.batch,
        warmup_steps=scale.warmup_steps,
        zero_shot=size == scale.sizes[-1] and scale.tokens_of_each is None,
    )
