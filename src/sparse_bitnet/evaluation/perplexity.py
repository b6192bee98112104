"""Token perplexity over non-overlapping windows, and bits per byte, which compares across tokenizers.

Shapes: B windows a batch, L tokens a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

WINDOW = 2048


@dataclass(frozen=True)
class Perplexity:
    """`loss` in nats a scored token; `convention` says in words what was scored."""

    perplexity: float
    loss: float
    bits_per_byte: float
    tokens_scored: int
    window: int
    convention: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"perplexity {self.perplexity:.4f}  bits per byte {self.bits_per_byte:.4f}  ({self.convention})"


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    ids: Tensor,
    text_bytes: int,
    window: int = WINDOW,
    batch_size: int = 4,
    begin: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Perplexity:
    """Perplexity of token ids [tokens] int64 that stand for `text_bytes` bytes of text.

    The text is cut into windows of `window` tokens that share nothing; in each, every token but the first is scored
    from those before it; what is left at the end is dropped, as is usual (GPTQ, arXiv 2210.17323). A text shorter than
    one window is one window. The window shrinks to the model's context. `begin` is a token id to put before each
    window, from which then its first token is scored too. ValueError for fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens, perplexity needs at least 2: give more text")
    if window < 2:
        raise ValueError(f"window={window} scores nothing: it must be at least 2")
    context = getattr(model.config, "max_position_embeddings", None) or window
    length = min(window, context - (begin is not None), len(ids))
    windows = ids[: len(ids) // length * length].view(-1, length)  # [windows, L]
    model.eval()
    total = 0.0
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size].to(model.device)  # [B, L]
        if begin is not None:
            batch = torch.nn.functional.pad(batch, (1, 0), value=begin)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        targets = batch[:, 1:].flatten()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"))
        progress(min(1.0, (start + batch_size) / len(windows)))
    scored = windows.shape[0] * (length - (begin is None))
    loss = total / scored
    first = "the first token of each not scored" if begin is None else f"each begun by token {begin} and scored whole"
    convention = (
        f"{windows.shape[0]} non-overlapping windows of {length:,} tokens, {first}, "
        f"{len(ids) - windows.numel():,} of {len(ids):,} tokens at the end dropped"
    )
    return Perplexity(
        perplexity=math.exp(min(loss, 700.0)),
        loss=loss,
        bits_per_byte=loss / math.log(2) * len(ids) / text_bytes,
        tokens_scored=scored,
        window=length,
        convention=convention,
    )


def unigram_perplexity(train_ids: Tensor, ids: Tensor, vocabulary: int) -> float:
    """Perplexity of token ids under the token frequencies of `train_ids`, one added to each count."""
    counts = torch.bincount(train_ids, minlength=vocabulary).double() + 1
    log_probabilities = (counts / counts.sum()).log()
    return math.exp(-float(log_probabilities[ids].mean()))
