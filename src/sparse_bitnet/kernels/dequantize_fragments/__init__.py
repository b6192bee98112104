"""Training: fragments for sparse tensor cores -> the effective weight [O, I] that they were packed from.

A layer whose forward product runs on fragments needs its weight as floats for the backward pass alone. To make it there
costs a pass over memory; to keep it costs 2 bytes a weight for as long as the step lasts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.kernels.dispatch import Backend, Operator

OPERATOR = Operator(__name__, (Backend("gpu_cuda", needs=("cuda.bindings",)), Backend("reference")))


@torch.library.custom_op("sparse_bitnet::dequantize_fragments", mutates_args=())
def dequantize_fragments(
    fragments: Tensor, row_scale: Tensor, out_features: int, in_features: int, m: int, dtype: torch.dtype
) -> Tensor:
    """Fragments of groups of m (formats/fragments.py), row_scale [O] or [1] fp32 -> scale * codes [O, I] in `dtype`."""
    return OPERATOR.run(fragments, row_scale, out_features, in_features, m, dtype)


@dequantize_fragments.register_fake
def _(fragments, row_scale, out_features, in_features, m, dtype):  # type: ignore[no-untyped-def]
    return fragments.new_empty(out_features, in_features, dtype=dtype)
