"""The residual that a product adds to what it gives, before it is rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_residual(residual: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """ValueError where it is another tensor than the product, which is so shaped, in that dtype and there."""
    if residual is None:
        return
    found, wanted = (list(residual.shape), residual.dtype, residual.device), (list(shape), dtype, device)
    if found != wanted:
        raise ValueError("residual is {} in {} on {}, and the product {} in {} on {}".format(*found, *wanted))
