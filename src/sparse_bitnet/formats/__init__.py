"""How codes are stored: one module a layout, each with `pack`, `unpack`, `bytes_per_row` and `has_invalid_codes`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sparse_bitnet.formats import i2
from sparse_bitnet.recipe import Recipe


@dataclass(frozen=True)
class Format:
    """A layout of ternary codes in bytes, row by row; the functions are described in the layout's own file."""

    name: str
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int], Tensor]
    bytes_per_row: Callable[[int], int]
    has_invalid_codes: Callable[[Tensor], bool]


FORMATS = {
    name: Format(name, layout.pack, layout.unpack, layout.bytes_per_row, layout.has_invalid_codes)
    for name, layout in {"i2": i2}.items()
}


def get_format(name: str) -> Format:
    """The format of that name; ValueError lists those that exist."""
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is unknown: use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def choose_format(recipe: Recipe, name: str = "auto") -> Format:
    """The format `name`, or for `auto` the one that suits the recipe; ValueError where nothing can hold its values."""
    if recipe.values == "full":
        raise ValueError("values='full' are not ternary and cannot be packed: save the latent checkpoint instead")
    return get_format("i2" if name == "auto" else name)
