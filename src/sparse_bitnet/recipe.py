"""What to train: the n:m pattern and the recipe of a sparse ternary layer, as frozen settings."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal, get_args

Values = Literal["ternary", "sign", "full"]
Activations = Literal["int8", "int4", "none"]
Order = Literal["quant-then-mask", "mask-then-quant"]
MaskFrom = Literal["latent", "quantized"]
Gradient = Literal["dense", "masked"]

LARGEST_M = 32  # the kernels hold a group in registers


@dataclass(frozen=True)
class NMPattern:
    """n:m sparsity: of every m consecutive weights of a row at most n are kept; n = m keeps all of them."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 2 <= self.m <= LARGEST_M:
            raise ValueError(f"pattern {self}: m must lie between 2 and {LARGEST_M}, for example 6:8")
        if not 1 <= self.n <= self.m:
            raise ValueError(f"pattern {self}: n must lie between 1 and m={self.m}; {self.m}:{self.m} is dense")

    @classmethod
    def parse(cls, text: str) -> NMPattern:
        """`"6:8"` -> NMPattern(6, 8); ValueError for anything that is not two whole numbers around a colon."""
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
        if match is None:
            raise ValueError(f"pattern {text!r} is not of the form n:m, for example '6:8'")
        return cls(int(match[1]), int(match[2]))

    @property
    def is_dense(self) -> bool:
        return self.n == self.m

    def check_width(self, in_features: int, name: str) -> None:
        """ValueError unless a row of `in_features` weights divides into groups of m."""
        if in_features % self.m:
            raise ValueError(f"in_features={in_features} is not a multiple of m={self.m} ({name}, pattern {self})")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True, init=False)
class Recipe:
    """How a layer is made ternary and sparse. The defaults are the method of arXiv 2603.05168, section 3.

    pattern      n:m of the mask, an `NMPattern` or text such as `"6:8"`
    values       ternary: {-1, 0, +1} x scale; sign: kept weights are -1 or +1; full: no quantisation
    activations  int8 / int4 per token, or none
    order        quant-then-mask: scale and codes of the dense weight; mask-then-quant: of the masked one
    mask_from    magnitudes that rank a group: the latent weight's, or those of its codes
    gradient     dense: masked weights learn too (dual STE); masked: they do not
    """

    pattern: NMPattern
    values: Values
    activations: Activations
    order: Order
    mask_from: MaskFrom
    gradient: Gradient

    def __init__(
        self,
        pattern: NMPattern | str = "6:8",
        *,
        values: Values = "ternary",
        activations: Activations = "int8",
        order: Order = "quant-then-mask",
        mask_from: MaskFrom = "latent",
        gradient: Gradient = "dense",
    ) -> None:
        settings = {
            "pattern": pattern if isinstance(pattern, NMPattern) else NMPattern.parse(pattern),
            "values": _one_of("values", values, get_args(Values)),
            "activations": _one_of("activations", activations, get_args(Activations)),
            "order": _one_of("order", order, get_args(Order)),
            "mask_from": _one_of("mask_from", mask_from, get_args(MaskFrom)),
            "gradient": _one_of("gradient", gradient, get_args(Gradient)),
        }
        for name, value in settings.items():
            object.__setattr__(self, name, value)
        if values != "ternary" and (order, mask_from) != ("quant-then-mask", "latent"):
            raise ValueError(
                f"order={order!r} with mask_from={mask_from!r} needs values='ternary': "
                f"values={values!r} has no zeros of its own for it to act on"
            )

    @property
    def keeps_weight(self) -> bool:
        """True where the effective weight is the latent weight itself: full values, no mask."""
        return self.values == "full" and self.pattern.is_dense

    def to_dict(self) -> dict[str, str]:
        """The six settings as text, the inverse of `from_dict`."""
        return {**asdict(self), "pattern": str(self.pattern)}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Recipe:
        """A recipe from its six settings; ValueError names an unknown one. A missing one takes its default."""
        unknown = set(settings) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown recipe setting {sorted(unknown)[0]!r}")
        return cls(**settings)

    @property
    def key(self) -> str:
        """The recipe as one string, for interfaces that pass text only; `from_key` reads it back."""
        return ",".join(self.to_dict().values())

    @classmethod
    @lru_cache(maxsize=256)
    def from_key(cls, key: str) -> Recipe:
        return cls.from_dict(dict(zip((field.name for field in fields(cls)), key.split(","), strict=True)))


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is not one of {', '.join(allowed)}")
    return value
