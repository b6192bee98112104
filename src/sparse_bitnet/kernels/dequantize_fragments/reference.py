"""The slow truth: plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.formats import fragments as layout
from sparse_bitnet.formats.windows import lifted_width, lower_weight


def obstacle() -> None:
    return None


def supports(
    fragments: Tensor, row_scale: Tensor, out_features: int, in_features: int, m: int, dtype: torch.dtype
) -> str | None:
    return None


def run(
    fragments: Tensor, row_scale: Tensor, out_features: int, in_features: int, m: int, dtype: torch.dtype
) -> Tensor:
    codes = lower_weight(layout.unpack(fragments, out_features)[:, : lifted_width(in_features, m)], m)  # [O, I]
    return codes.to(dtype) * row_scale.to(dtype).unsqueeze(-1)
