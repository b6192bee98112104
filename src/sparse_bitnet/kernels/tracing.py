"""Where torch.compile sees plain mathematics instead of an operator."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_TOKENS = 64


def is_traced_with_few_tokens(x: Tensor) -> bool:
    """Whether torch.compile is at work on x [..., I], of so few tokens that a launch costs as much as what it does."""
    return torch.compiler.is_compiling() and x.numel() <= MOST_TOKENS * x.shape[-1]
