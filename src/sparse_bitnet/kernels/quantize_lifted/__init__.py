"""Activations x [..., I] -> lifted integer codes [..., K] int8 and scale [..., 1] fp32, for sparse tensor cores."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from sparse_bitnet.formats.windows import lifted_width
from sparse_bitnet.kernels.dispatch import Backend, Operator
from sparse_bitnet.recipe import Activations

OPERATOR = Operator(
    __name__,
    (Backend("gpu_cuda", needs=("cuda.bindings",)), Backend("gpu_triton", needs=("triton",)), Backend("reference")),
)


def quantize_lifted(x: Tensor, activations: Activations, m: int) -> tuple[Tensor, Tensor]:
    """`numerics.activation.quantize_activation` with its codes lifted for groups of m; see formats/windows.py.

    m = 4 is no lift at all. Without gradient.
    """
    return _quantize_lifted(x, activations, m)


@torch.library.custom_op("sparse_bitnet::quantize_lifted", mutates_args=())
def _quantize_lifted(x: Tensor, activations: str, m: int) -> tuple[Tensor, Tensor]:
    return OPERATOR.run(x, cast(Activations, activations), m)


@_quantize_lifted.register_fake
def _(x: Tensor, activations: str, m: int) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(*x.shape[:-1], lifted_width(x.shape[-1], m), dtype=torch.int8)
    return codes, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
