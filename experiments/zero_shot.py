"""Zero-shot accuracy: the likeliest continuation is the answer, as lm-evaluation-harness has it.

Written anew because a run ends on a machine without the harness; tests/experiments compares the two, item by item.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from experiments.corpus import Item

TOKENS_A_BATCH = 16_384
LONGEST = 512


@dataclass(frozen=True)
class Accuracy:
    """Shares of `questions` answered rightly: by the sum of log-probabilities, and by that a character."""

    questions: int
    sum: float
    by_character: float


def answer_tasks(model: nn.Module, tasks: Mapping[str, list[Item]]) -> dict[str, Accuracy]:
    """Accuracy on each task, and on the sets of a family `family/set` together."""
    found = {}
    for name, items in tasks.items():
        scores = iter(_log_likelihoods(model, items))
        by_sum, by_character = [], []
        for item in items:
            own = [next(scores) for _ in item.continuations]
            by_sum.append(_best(own) == item.right)
            by_character.append(_best([s / max(n, 1) for s, n in zip(own, item.characters, strict=True)]) == item.right)
        found[name] = Accuracy(len(items), fmean(by_sum), fmean(by_character))
    for family in sorted({name.partition("/")[0] for name in found if "/" in name}):
        members = [accuracy for name, accuracy in found.items() if name.startswith(f"{family}/")]
        found[family] = Accuracy(
            sum(one.questions for one in members),
            fmean(one.sum for one in members),
            fmean(one.by_character for one in members),
        )
    return found


@torch.no_grad()
def _log_likelihoods(model: nn.Module, items: list[Item]) -> list[float]:
    """Log-probability of every continuation after its context, in order; texts of like length go together."""
    texts = [
        ((item.context + ids)[-LONGEST:], len(ids)) for item in items for ids in item.continuations
    ]  # tokens, and how many of them at the end are scored
    order = sorted(range(len(texts)), key=lambda index: len(texts[index][0]))
    device = next(model.parameters()).device
    found = [0.0] * len(texts)
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * len(texts[order[end]][0]) <= TOKENS_A_BATCH:
            end += 1
        batch = order[start:end]
        scores = _score(model, [texts[index] for index in batch], device).tolist()
        for index, score in zip(batch, scores, strict=True):
            found[index] = score
        start = end
    return found


def _score(model: nn.Module, texts: list[tuple[list[int], int]], device: torch.device) -> Tensor:
    """Log-probability [B] of the last tokens of each text, padded on the right, where a causal model does not look."""
    length = max(len(ids) for ids, _ in texts)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in texts], device=device)  # [B, L]
    ends = torch.tensor([len(ids) for ids, _ in texts], device=device)[:, None]
    counts = torch.tensor([count for _, count in texts], device=device)[:, None]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()  # [B, L - 1, V]
    chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # [B, L - 1], of token 1, 2, ...
    place = torch.arange(1, length, device=device)
    return chosen.double().masked_fill((place < ends - counts) | (place >= ends), 0).sum(-1)


def _best(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
