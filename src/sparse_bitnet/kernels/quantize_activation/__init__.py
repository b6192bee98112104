"""Training: activations x [..., I] -> the same rounded to per-token integer codes and back, straight-through."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import Tensor

from sparse_bitnet.kernels.dispatch import FORCE_VARIABLE, Backend, Operator
from sparse_bitnet.numerics import activation
from sparse_bitnet.numerics.ste import activation_gradient
from sparse_bitnet.recipe import Activations

OPERATOR = Operator(__name__, (Backend("gpu_triton", needs=("triton",)), Backend("reference")))


def fake_quantize_activation(x: Tensor, activations: Activations, dtype: torch.dtype) -> Tensor:
    """`numerics.activation.fake_quantize_activation` by the best backend; its gradient passes straight through.

    torch.compile sees the plain mathematics, to fuse it with the norm or the product before it, and nothing is called
    from Python for each layer. A forced backend is called there too.
    """
    if activations == "none":
        return x.to(dtype)
    if torch.compiler.is_compiling() and not os.environ.get(FORCE_VARIABLE):
        return _FakeQuantize.apply(x, activations, dtype)  # type: ignore[no-any-return]
    return _fake_quantize_activation(x, activations, dtype)


@torch.library.custom_op("sparse_bitnet::fake_quantize_activation", mutates_args=())
def _fake_quantize_activation(x: Tensor, activations: str, dtype: torch.dtype) -> Tensor:
    return OPERATOR.run(x, cast(Activations, activations), dtype)


@_fake_quantize_activation.register_fake
def _(x: Tensor, activations: str, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return activation_gradient(gradient, ctx.dtype), None, None


_fake_quantize_activation.register_autograd(_backward, setup_context=_save_for_backward)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activations: Activations, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        return activation.fake_quantize_activation(x, activations, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _backward(ctx, gradient)
