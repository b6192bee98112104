"""The loss over a large vocabulary without its logits: Liger's fused linear cross-entropy, on a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

TOKENS_AT_A_TIME = 4096  # whose logits are held at a time; Liger's own budget holds 128 of 16,384 at 0.5 B
ONLY_THE_LOSS = {
    "fused_linear_cross_entropy": True, "rope": False, "rms_norm": False, "swiglu": False, "cross_entropy": False,
}  # fmt: skip


def fused_loss_obstacle(model: PreTrainedModel) -> str | None:
    """Why the fused loss cannot be used here for `model`; None where it can."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if find_spec("liger_kernel") is None:
        return "needs the package liger-kernel: pip install 'sparse-bitnet[gpu]'"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # pyright: ignore

    kind = model.config.model_type
    return None if kind in MODEL_TYPE_TO_APPLY_LIGER_FN else f"Liger does not know model_type {kind}"


def logits_budget(model: PreTrainedModel, tokens: int) -> dict[str, Any]:
    """The argument of the patched `forward` by which `tokens` tokens are done TOKENS_AT_A_TIME at a time.

    Liger cuts them into V / (budget x hidden size) chunks and rounds their length up to a power of two.
    """
    embedding: Any = model.get_output_embeddings()
    vocabulary, hidden = embedding.weight.shape
    return {"chunk_mem_const": max(1, -(-vocabulary * TOKENS_AT_A_TIME // (hidden * tokens)))}
