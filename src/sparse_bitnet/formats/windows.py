"""Windows: an n:m sparse weight with n <= m - 2 as a 2:4 sparse one of 2 - 4/m times the columns.

Sparse tensor cores multiply 2:4 weights only. A block of m columns, m even, is cut into m/2 - 1 windows of four columns
that overlap by two; each weight that is not 0 goes into the first window that still has room, two a window, and the
activations of each window are repeated with it. With m = 8:

    columns of a block   0 1 2 3 4 5 6 7
    window 0             0 1 2 3              lifted columns 0 .. 3
    window 1                 2 3 4 5          4 .. 7
    window 2                     4 5 6 7      8 .. 11

Of m - 2 weights none is left over. 2:4 is its own lift, 6:8 costs 1.5 columns for 1. (SlideSparse, arXiv 2603.05232)

Shapes: O out_features, I in_features, K = I * (2 - 4 / m) lifted columns; leading dimensions are free.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_bitnet.recipe import NMPattern

WINDOW, STRIDE, HELD = 4, 2, 2  # columns, columns between windows, weights a window that are not 0


def lift_obstacle(pattern: NMPattern) -> str | None:
    """Why a weight of this pattern has no 2:4 lift; None where it has one."""
    if pattern.m % 2 or pattern.m < WINDOW:
        return f"pattern {pattern} has no windows of 4: m must be even and at least 4"
    if pattern.n > pattern.m - STRIDE:
        return f"pattern {pattern} keeps more than m - 2 = {pattern.m - STRIDE} weights a group"
    return None


def lifted_width(in_features: int, m: int) -> int:
    """K for I columns in blocks of m."""
    return in_features // m * (m // STRIDE - 1) * WINDOW


def lift_activation(x: Tensor, m: int) -> Tensor:
    """x [..., I] -> [..., K], the columns of each window side by side."""
    if m == WINDOW:
        return x
    return _blocks(x, m).unfold(-1, WINDOW, STRIDE).flatten(-3)


def lift_weight(codes: Tensor, m: int) -> Tensor:
    """codes [..., I] -> [..., K], 2:4, each code that is not 0 once; ValueError where a block holds more than m - 2."""
    rest = _blocks(codes, m)
    windows: list[Tensor] = []
    for start in range(0, m - STRIDE, STRIDE):
        window = rest[..., start : start + WINDOW]
        taken = torch.where((window != 0).cumsum(-1) <= HELD, window, 0)  # [..., G, 4]
        windows.append(taken)
        rest = rest - pad(taken, (start, m - WINDOW - start))
    if not rest.is_meta and bool((rest != 0).any()):
        raise ValueError(f"a block of {m} codes holds more than {m - STRIDE} that are not 0: it has no 2:4 lift")
    return torch.stack(windows, dim=-2).flatten(-3)


def lower_weight(lifted: Tensor, m: int) -> Tensor:
    """[..., K] -> codes [..., I], the inverse of `lift_weight`."""
    windows = lifted.reshape(*lifted.shape[:-1], lifted.shape[-1] // (2 * m - 4), m // STRIDE - 1, WINDOW)
    starts, ends = windows[..., :STRIDE], windows[..., STRIDE:]  # [..., G, m / 2 - 1, 2]: each but the ends is in two
    return (pad(starts, (0, 0, 0, 1)) + pad(ends, (0, 0, 1, 0))).flatten(-3)


def _blocks(x: Tensor, m: int) -> Tensor:
    """[..., I] -> [..., I / m, m]"""
    return x.reshape(*x.shape[:-1], x.shape[-1] // m, m)
