"""When the loss goes without its logits, and how many tokens it takes at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from sparse_bitnet.training.config import TrainConfig
from sparse_bitnet.training.fused_loss import TOKENS_AT_A_TIME, fused_loss_obstacle, logits_budget
from sparse_bitnet.training.run import train

Model = Callable[..., PreTrainedModel]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_if_asked_for(settings: Callable[..., TrainConfig], dense_model: Model) -> None:
    assert fused_loss_obstacle(dense_model()) == "torch finds no GPU"
    with pytest.raises(ValueError, match=r"training\.fused_loss=true: torch finds no GPU"):
        train(settings("training.fused_loss=true"))


@dataclass
class Embedding:
    weight: torch.Tensor


@pytest.mark.parametrize("tokens", [256, 4096, 16384, 100_000])
@pytest.mark.parametrize(("vocabulary", "hidden"), [(151_936, 896), (151_936, 2048), (320, 64), (1000, 4096)])
def test_the_budget_holds_about_as_many_tokens_as_it_should(
    tokens: int, vocabulary: int, hidden: int, dense_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Liger's rule: tokens / ceil(V / (budget x hidden)), rounded up to a power of two."""
    model = dense_model()
    head = Embedding(torch.empty(vocabulary, hidden, device="meta"))
    monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
    budget = logits_budget(model, tokens)["chunk_mem_const"]
    chunk = math.ceil(tokens / math.ceil(vocabulary / (budget * hidden)))
    assert min(tokens, TOKENS_AT_A_TIME) <= 2 ** math.ceil(math.log2(chunk))
    if vocabulary > hidden:  # else one unit of budget holds more
        assert chunk <= 2 * TOKENS_AT_A_TIME or budget == 1
