"""Per-token integer activations.

Shapes: T tokens (any leading dimensions), I in_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.recipe import Activations

SMALLEST_MAGNITUDE = 1e-5  # keeps the scale of an all-zero token finite
SQUARE_ROOT_OF_7 = 2.6457512378692627  # as fp32 holds it


def quantize_activation(x: Tensor, activations: Activations) -> tuple[Tensor, Tensor]:
    """x [..., I] float -> codes [..., I] int8 and scale [..., 1] fp32, x being about codes / scale.

    int8: scale = 127 / max|x|, codes in -128..127; int4: scale = sqrt(7) / mean|x|, codes in -8..7. Rounding is half
    to even; the mean is taken in fp64, so that it does not depend on the order of addition. ValueError for `none`.
    (arXiv 2603.05168, section 3; int4: BitNet a4.8, arXiv 2411.04965)
    """
    x = x.float()
    if activations == "int8":
        scale = _quotient(127.0, x.abs().amax(dim=-1, keepdim=True))
        return (x * scale).round().clamp(-128, 127).to(torch.int8), scale
    if activations == "int4":
        scale = _quotient(SQUARE_ROOT_OF_7, x.abs().mean(dim=-1, keepdim=True, dtype=torch.float64).float())
        return (x * scale).round().clamp(-8, 7).to(torch.int8), scale
    raise ValueError(f"activations={activations!r} have no integer codes")


def fake_quantize_activation(x: Tensor, activations: Activations, dtype: torch.dtype) -> Tensor:
    """x [..., I] rounded to its integer codes and back, codes / scale, in `dtype`; `none` only casts."""
    if activations == "none":
        return x.to(dtype)
    codes, scale = quantize_activation(x, activations)
    return (codes / scale).to(dtype)


def _quotient(number: float, magnitude: Tensor) -> Tensor:
    """number / max(magnitude, 1e-5) in fp32, correctly rounded, also where a compiler divides fp32 less well.

    In fp64 every backend divides exactly rounded, and rounding that to fp32 is innocuous (53 >= 2 x 24 + 2 bits).
    `number / tensor` would be number * (1 / tensor) in PyTorch.
    """
    magnitude = magnitude.clamp(min=SMALLEST_MAGNITUDE).double()
    return (torch.full_like(magnitude, number) / magnitude).float()
