"""Where Triton's kernels can run: on a GPU, or, with TRITON_INTERPRET=1, anywhere in its interpreter, for tests."""

from __future__ import annotations

import os

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def obstacle() -> str | None:
    """Why no kernel can run here; None where they can."""
    return None if INTERPRETED or torch.cuda.is_available() else "torch finds no GPU"


def is_within_reach(tensor: Tensor) -> bool:
    return INTERPRETED or tensor.device.type == "cuda"
