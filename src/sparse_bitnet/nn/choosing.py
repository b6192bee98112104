"""How one way of computing something is chosen among several: by what each of them takes on the GPU at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


def grouped(layers: Sequence[PackedLinear]) -> Iterator[list[PackedLinear]]:
    """Those that are alike: of one device, shape and recipe."""

    def kind(layer: PackedLinear) -> tuple[str, int, int, str]:
        return str(layer.weight.device), layer.out_features, layer.in_features, layer.recipe.key

    return (list(group) for _, group in groupby(sorted(layers, key=kind), key=kind))


def microseconds_of_a_layer(
    ways: Mapping[str, Callable[[Layer], object]], layers: Sequence[Layer], device: torch.device
) -> dict[str, float]:
    """What each of `ways` takes for one of `layers`, which are alike."""
    measured = layers[:MOST_LAYERS]
    return {
        name: 1e3 / len(measured) * milliseconds(lambda way=way: [way(one) for one in measured], REPEATS, device)
        for name, way in ways.items()
    }  # fmt: skip


def lowest_from(times: Times, way: str, other: str) -> int:
    """The lowest number of tokens from which on `way` is never slower than `other`; NEVER."""
    lowest = NEVER
    for tokens in sorted(times, reverse=True):
        if times[tokens].get(way, float("inf")) > times[tokens][other]:
            break
        lowest = tokens
    return lowest


def told(times: Times, tokens: int, way: str, other: str) -> str:
    """What each takes, and which is taken."""
    each = ", ".join(f"{name} {time:.1f}" for name, time in times[tokens].items())
    return f"{each} us: {way if tokens >= lowest_from(times, way, other) else other}"
