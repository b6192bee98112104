"""The gradient of the activations, straight through their rounding, for adapters below a frozen packed layer.

The codes are constants. The effective weight is unpacked for the product and let go: a layer's at a time.
Shapes: T tokens (any leading dimensions), O out_features, I in_features, P parts, B bytes a row.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_bitnet.formats import get_format
from sparse_bitnet.numerics.ternary import Parts, dequantize_weight


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Of the arguments of the op, those that the gradients need; none is a copy."""
    _, weight, scale, _, ctx.format, ctx.in_features, _, parts = inputs
    ctx.parts = tuple(parts)
    ctx.save_for_backward(weight, scale)


def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dy [..., O] -> gradients of x [..., I] and bias [O], where they are wanted; of nothing else."""
    weight, scale = ctx.saved_tensors
    wants_input, _, _, wants_bias, *settings = ctx.needs_input_grad
    dx = input_gradient(dy, weight, scale, ctx.format, ctx.in_features, ctx.parts) if wants_input else None
    dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if wants_bias else None
    return dx, None, None, dbias, *(None for _ in settings)


def input_gradient(dy: Tensor, weight: Tensor, scale: Tensor, format: str, in_features: int, parts: Parts) -> Tensor:
    """dy [..., O] float, weight [O, B] uint8, scale [P] fp32 -> dx [..., I] = dy . effective weight, in dy's dtype."""
    codes = get_format(format).unpack(weight, in_features)
    return dy @ dequantize_weight(codes, scale, parts, dy.dtype)
