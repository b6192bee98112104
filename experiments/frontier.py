"""Perplexity against the bits that a weight costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean

from experiments.degradation import perplexities
from experiments.results import Results
from experiments.settings import Scale
from experiments.statistics import codes_bits
from experiments.tables import FRONTIER, on_frontier
from sparse_bitnet.formats import FORMATS, Format
from sparse_bitnet.recipe import Recipe


@dataclass(frozen=True)
class Point:
    """One recipe; `stored_bits` a weight in its smallest format, `least_bits` of any code, `perplexities` by seed."""

    name: str
    values: str
    pattern: str
    residual: bool
    format: str
    stored_bits: float
    least_bits: float
    perplexities: tuple[float, ...]


stored_bits = attrgetter("stored_bits")
least_bits = attrgetter("least_bits")


def points(scale: Scale, results: Results) -> list[Point]:
    """Every recipe of Table C, the cheapest first; without perplexities where it is not run yet."""
    found = [_point(scale, results, *recipe) for recipe in FRONTIER]
    return sorted(found, key=lambda point: (point.stored_bits, point.least_bits))


def efficient(found: list[Point], bits: Callable[[Point], float]) -> list[Point]:
    """Those with results that no other one of as few `bits` beats in mean perplexity, the cheapest first."""
    known = sorted((point for point in found if point.perplexities), key=bits)
    lowest = {point: fmean(point.perplexities) for point in known}
    return [
        point for point in known if all(lowest[other] >= lowest[point] for other in known if bits(other) <= bits(point))
    ]


def smallest_format(recipe: Recipe) -> Format:
    """Of the formats that hold its codes, the one with the fewest bits."""
    return min((one for one in FORMATS.values() if one.fits(recipe)), key=lambda one: one.bits)


def _point(scale: Scale, results: Results, values: str, pattern: str, residual: float) -> Point:
    recipe = Recipe.from_dict({"pattern": pattern, "values": values})
    layout, n, m = smallest_format(recipe), recipe.pattern.n, recipe.pattern.m
    seen = perplexities(scale, results, "ternary", on_frontier(scale, values, pattern, residual))
    name = f"{values} {pattern}{', residual' if residual else ''}"
    least = codes_bits(n, m, values)
    return Point(name, values, pattern, bool(residual), layout.name, layout.bits, least, tuple(seen.values()))
