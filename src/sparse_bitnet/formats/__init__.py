"""How codes are stored: one module a layout, each with `pack`, `unpack`, `bytes_per_row` and `has_invalid_codes`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sparse_bitnet.formats import g4, i2, t5
from sparse_bitnet.recipe import NMPattern, Recipe


@dataclass(frozen=True)
class Format:
    """A layout of ternary codes in bytes, row by row; the functions are described in the layout's own file.

    holds  what it holds, in words; `fits` tells whether the codes of a recipe are always of this kind
    """

    name: str
    bits: float
    holds: str
    fits: Callable[[Recipe], bool]
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int], Tensor]
    bytes_per_row: Callable[[int], int]
    has_invalid_codes: Callable[[Tensor], bool]

    def __str__(self) -> str:
        return f"{self.name}, {self.bits:g} bits a weight: {self.holds}"


def _format(name: str, bits: float, holds: str, fits: Callable[[Recipe], bool], layout: object) -> Format:
    functions = (getattr(layout, part) for part in ("pack", "unpack", "bytes_per_row", "has_invalid_codes"))
    return Format(name, bits, holds, fits, *functions)


def _always(recipe: Recipe) -> bool:
    return True


def _at_most_two_of_four(recipe: Recipe) -> bool:
    return recipe.pattern.m % 4 == 0 and recipe.pattern.n <= 2


def _sign(pattern: NMPattern) -> Callable[[Recipe], bool]:
    return lambda recipe: recipe.values == "sign" and recipe.pattern == pattern


FORMATS = {
    layout.name: layout
    for layout in (
        _format("g4s3", 1.25, "exactly 3 of 4 are not 0", _sign(NMPattern(3, 4)), g4.EXACTLY_THREE),
        _format("g4s2", 1.25, "exactly 2 of 4 are not 0", _sign(NMPattern(2, 4)), g4.EXACTLY_TWO),
        _format("g4", 1.5, "at most 2 of 4 are not 0", _at_most_two_of_four, g4.AT_MOST_TWO),
        _format("i2", 2.0, "any pattern", _always, i2),
        _format("t5", 1.6, "any pattern", _always, t5),
    )
}
"""In the order in which `auto` tries them."""


def get_format(name: str) -> Format:
    """The format of that name; ValueError lists those that exist."""
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is unknown: use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def choose_format(recipe: Recipe, name: str = "auto") -> Format:
    """The format `name` for the codes of `recipe`; for `auto`, and among those called g4..., the first that fits.

    ValueError where none can hold its values, or `name` is unknown or does not fit.
    """
    if recipe.values == "full":
        raise ValueError("values='full' are not ternary and cannot be packed: save the latent checkpoint instead")
    family = {"auto": "", "g4": "g4"}.get(name)
    candidates = (
        [get_format(name)] if family is None else [one for key, one in FORMATS.items() if key.startswith(family)]
    )
    for candidate in candidates:
        if candidate.fits(recipe):
            return candidate
    raise ValueError(
        f"format {name} holds groups in which {candidates[-1].holds}, which values={recipe.values!r} with "
        f"pattern {recipe.pattern} do not promise: use i2 or t5"
    )
