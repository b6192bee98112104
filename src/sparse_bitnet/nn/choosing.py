"""How one of two ways of computing something is chosen: by what each of them takes on the GPU at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeVar

import torch

from sparse_bitnet.kernels.timing import milliseconds
from sparse_bitnet.nn.packed_linear import PackedLinear

REPEATS = 5
MOST_LAYERS = 16  # of one kind, measured in turn, so that weights come from memory as they do in a model
NEVER = 2**62

Times = dict[int, dict[str, float]]  # microseconds by tokens and way
Layer = TypeVar("Layer")


@dataclass(frozen=True)
class Choice:
    """What was measured for layers that are alike, and chosen.

    subject                which layers
    ways                   the one that is taken from some number of tokens on, and the one that is taken below
    microseconds           of each way that can be gone, by the number of tokens
    compiled_microseconds  of few tokens under torch.compile
    refusal                why the first way cannot be gone; None where it can
    """

    subject: str
    ways: tuple[str, str]
    microseconds: Times
    compiled_microseconds: Times = field(default_factory=dict)
    refusal: str | None = None

    @property
    def taken_from(self) -> int:
        """The number of tokens; NEVER."""
        return self._lowest(self.microseconds)

    @property
    def compiled_taken_from(self) -> int:
        return self._lowest(self.compiled_microseconds)

    def __str__(self) -> str:
        lines = [self.subject]
        for tokens in self.microseconds:
            line = f"{tokens:>8} tokens: {self._told(self.microseconds, tokens)}"
            is_few = tokens in self.compiled_microseconds
            lines.append(line + (f"; compiled {self._told(self.compiled_microseconds, tokens)}" if is_few else ""))
        return "\n".join([*lines, *([f"   no {self.ways[0]}: {self.refusal}"] if self.refusal else [])])

    def _lowest(self, times: Times) -> int:
        """From there on the first way is never the slower."""
        first, second = self.ways
        lowest = NEVER
        for tokens in sorted(times, reverse=True):
            if times[tokens].get(first, float("inf")) > times[tokens][second]:
                break
            lowest = tokens
        return lowest

    def _told(self, times: Times, tokens: int) -> str:
        each = ", ".join(f"{way} {time:.1f}" for way, time in times[tokens].items())
        return f"{each} us: {self.ways[tokens < self._lowest(times)]}"


def microseconds_of_a_layer(
    ways: Mapping[str, Callable[[Layer], object]], layers: Sequence[Layer], device: torch.device
) -> dict[str, float]:
    """What each of `ways` takes for one of `layers`, which are alike."""
    measured = layers[:MOST_LAYERS]
    return {
        name: 1e3 / len(measured) * milliseconds(lambda way=way: [way(one) for one in measured], REPEATS, device)
        for name, way in ways.items()
    }  # fmt: skip


def grouped(items: Sequence[Layer], layer_of: Callable[[Layer], PackedLinear]) -> Iterator[list[Layer]]:
    """Those whose layers are alike: of one device, shape and recipe."""

    def kind(item: Layer) -> tuple[str, int, int, str]:
        layer = layer_of(item)
        return str(layer.weight.device), layer.out_features, layer.in_features, layer.recipe.key

    return (list(group) for _, group in groupby(sorted(items, key=kind), key=kind))
