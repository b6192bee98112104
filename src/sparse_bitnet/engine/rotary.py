"""Rotary position embeddings: by how much each pair of a head's numbers is turned from one position to the next.

Shapes: D head_dim. Turned are pairs (i, i + D / 2), as in the models of transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """The kind, the base, and the numbers of the kind under their names in config.json."""

    KINDS: ClassVar[tuple[str, ...]] = ("default", "linear", "llama3", "yarn")

    kind: str
    base: float
    head: int
    settings: dict[str, Any]

    @classmethod
    def from_config(cls, config: dict[str, Any], head: int) -> Rotary:
        """From `rope_parameters`, or `rope_theta` and `rope_scaling` as older checkpoints have them; ValueError."""
        settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(settings, dict):
            raise ValueError(f"rope_parameters={settings!r} is not an object")
        settings = {"original_max_position_embeddings": config.get("max_position_embeddings"), **settings}
        kind = settings.get("rope_type", settings.get("type", "default"))
        base = settings.get("rope_theta", config.get("rope_theta", 10_000.0))
        rotary = cls(str(kind), _number("rope_theta", base), head, settings)
        if settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
            return cls("partial", rotary.base, head, settings)
        return rotary

    def frequencies(self) -> tuple[Tensor, float]:
        """[D / 2] fp32 radians a position, and a factor on sines and cosines; ValueError where a number is missing."""
        dense = 1.0 / self.base ** (torch.arange(0, self.head, 2, dtype=torch.float32) / self.head)
        if self.kind == "linear":
            return dense / self._get("factor"), 1.0
        if self.kind == "llama3":
            return self._llama3(dense), 1.0
        if self.kind == "yarn":
            return self._yarn(dense)
        return dense, 1.0

    def _llama3(self, dense: Tensor) -> Tensor:
        """Long waves are stretched, short ones kept, and those between a mixture (Llama 3.1)."""
        factor, low, high = self._get("factor"), self._get("low_freq_factor"), self._get("high_freq_factor")
        if low == high:
            raise ValueError("low_freq_factor and high_freq_factor of rope_parameters are equal")
        waves = self._get("original_max_position_embeddings") * dense / (2 * math.pi)  # in the original context
        kept = ((waves - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * dense / factor + kept * dense

    def _yarn(self, dense: Tensor) -> tuple[Tensor, float]:
        """Stretched where a wave turns less than `beta_slow` times in the original context (arXiv 2309.00071)."""
        factor, context = self._get("factor"), self._get("original_max_position_embeddings")

        def dimension(turns: float) -> float:
            return self.head * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(self.base))

        low, high = dimension(self._get("beta_fast", 32.0)), dimension(self._get("beta_slow", 1.0))
        if self.settings.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head - 1)
        stretched = ((torch.arange(self.head // 2) - low) / (high - low or 0.001)).clamp(0, 1)
        scale = self._get("mscale", 0.0), self._get("mscale_all_dim", 0.0)
        length = 0.1 * math.log(factor) if factor > 1 else 0.0
        inferred = (length * scale[0] + 1) / (length * scale[1] + 1) if all(scale) else length + 1
        frequencies = dense / factor * stretched + dense * (1 - stretched)
        return frequencies, self._get("attention_factor", inferred)

    def _get(self, name: str, default: float | None = None) -> float:
        value = self.settings.get(name)
        if value is None:
            value = default
        return 0.0 if value == 0 and default == 0 else _number(name, value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} of rope_parameters is no positive number")
    return float(value)
