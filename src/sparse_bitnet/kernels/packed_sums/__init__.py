"""For torch.compile: `packed_linear` for few tokens of which the product alone is an operator.

Quantisation and scaling are plain mathematics there, which the compiler joins to what stands before and behind. So all
between two products is one kernel: scales, residual, norm, and quantisation for the next product. With COMPILE_OPTIONS
it is: they let that kernel write codes in planes, and look for the largest value of a wide token by itself.

Shapes: T tokens, O out_features, I in_features, B bytes a row, S splits.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_bitnet.kernels.dispatch import Backend, Operator
from sparse_bitnet.kernels.packed_linear import PackedLayout
from sparse_bitnet.numerics.activation import quantize_activation

OPERATOR = Operator(__name__, (Backend("gpu_triton", needs=("triton",)), Backend("reference")))
COMPILE_OPTIONS = {"triton.tiling_prevents_reduction_fusion": False, "split_reductions": False}
MOST_TOKENS = 64


def is_fused(x: Tensor) -> bool:
    """Whether a product of x [..., I] is traced, and of so few tokens that launches count."""
    return torch.compiler.is_compiling() and x.numel() <= MOST_TOKENS * x.shape[-1]


def packed_linear_of_sums(
    x: Tensor, weight: Tensor, row_scale: Tensor, bias: Tensor | None, layout: PackedLayout
) -> Tensor:
    """`packed_linear` of a weight [O, B] uint8 in the format i2, by row_scale [O] or [1] fp32."""
    rows, row_bytes = weight.shape
    codes, token_scale = quantize_activation(x.reshape(-1, layout.in_features), layout.activations)  # [T, I], [T, 1]
    by_byte = pad(codes, (0, 4 * row_bytes - layout.in_features)).view(-1, row_bytes, 4, 1)
    parts = packed_sums(by_byte.contiguous(memory_format=torch.channels_last), weight)
    total = reduce(torch.add, parts.unbind()) - codes.sum(-1, keepdim=True, dtype=torch.int32)
    y = total.float() * (row_scale / token_scale)
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], rows)


@torch.library.custom_op("sparse_bitnet::packed_sums", mutates_args=())
def packed_sums(codes: Tensor, weight: Tensor) -> Tensor:
    """codes [T, B, 4, 1] int8, weight [O, B] uint8 in the format i2 -> [S, T, O] int32, parts of the sums of codes x
    (weight's codes + 1).

    codes are best given in planes: channels last, which is the order [T, 4, B] in memory.
    """
    return OPERATOR.run(codes, weight)


@packed_sums.register_fake
def _(codes: Tensor, weight: Tensor) -> Tensor:
    splits = 1
    if codes.device.type == "cuda" and OPERATOR.forced() != "reference":
        from sparse_bitnet.kernels.packed_linear.gpu_triton import choose_tile

        splits = choose_tile(int(codes.shape[0]), *weight.shape).splits
    return codes.new_empty(splits, codes.shape[0], weight.shape[0], dtype=torch.int32)
