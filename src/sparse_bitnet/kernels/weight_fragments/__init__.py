"""Training and loading: effective weights [O, I] or their codes -> fragments for sparse tensor cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_bitnet.formats import fragments
from sparse_bitnet.formats.windows import lifted_width
from sparse_bitnet.kernels.dispatch import Backend, Operator

OPERATOR = Operator(__name__, (Backend("gpu_cuda", needs=("cuda.bindings",)), Backend("reference")))


@torch.no_grad()
def write_fragments(weights: Sequence[Tensor], m: int, out: Sequence[Tensor]) -> None:
    """The signs of many weights [O, I], of any pattern n:m with n <= m - 2, into `out`, which `empty_fragments` gave.

    See formats/windows.py for the lift and formats/fragments.py for the layout. A weight that does not hold its pattern
    is cut to what fits, without a word, on a GPU. What autograd saved of `out` before may not be used after.
    """
    OPERATOR.run(weights, m, out)
    torch.autograd.graph.increment_version(out)


def empty_fragments(weight: Tensor, m: int) -> Tensor:
    """Room [G, S, 128, 4] int32 for the fragments of a weight [O, I], filled with those of zeros."""
    height, width = weight.shape
    room = torch.zeros(fragments.shape(height, lifted_width(width, m)), dtype=torch.int32, device=weight.device)
    room[..., ::2] = fragments.METADATA_OF_ZEROS
    return room
