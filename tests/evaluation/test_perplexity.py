"""Perplexity against a sum over windows and tokens written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from sparse_bitnet.evaluation.perplexity import perplexity, unigram_perplexity

Make = Callable[..., PreTrainedModel]


def by_hand(model: PreTrainedModel, ids: torch.Tensor, window: int) -> float:
    losses = []
    for start in range(0, len(ids) - window + 1, window):
        piece = ids[start : start + window]
        with torch.no_grad():
            probabilities = model(input_ids=piece[None]).logits[0].double().log_softmax(-1)
        losses += [-float(probabilities[t, piece[t + 1]]) for t in range(window - 1)]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_do_not_overlap_and_the_rest_is_dropped(dense_model: Make, batch_size: int) -> None:
    model, ids = dense_model().eval(), torch.randint(0, 320, (150,))
    result = perplexity(model, ids, text_bytes=600, window=40, batch_size=batch_size)
    assert result.perplexity == pytest.approx(by_hand(model, ids, 40), rel=1e-5)
    assert result.tokens_scored == 3 * 39
    assert "3 non-overlapping windows of 40 tokens" in result.convention
    assert "30 of 150 tokens at the end dropped" in result.convention


def test_a_token_before_each_window_has_its_first_token_scored(dense_model: Make) -> None:
    model, ids = dense_model().eval(), torch.randint(1, 320, (120,))
    result = perplexity(model, ids, text_bytes=600, window=40, begin=0)
    begun = torch.nn.functional.pad(ids.view(3, 40), (1, 0), value=0).flatten()
    assert result.perplexity == pytest.approx(by_hand(model, begun, 41), rel=1e-5)
    assert result.tokens_scored == 120
    assert "each begun by token 0" in result.convention


def test_bits_per_byte_spread_the_loss_over_the_bytes(dense_model: Make) -> None:
    result = perplexity(dense_model(), torch.randint(0, 320, (120,)), text_bytes=480, window=40)
    assert result.bits_per_byte == pytest.approx(math.log2(result.perplexity) * 120 / 480)


def test_the_window_shrinks_to_the_context_and_to_the_text(dense_model: Make) -> None:
    model = dense_model()
    assert perplexity(model, torch.randint(0, 320, (300,)), 1).window == 128
    assert perplexity(model, torch.randint(0, 320, (50,)), 1).window == 50


def test_too_little_text_is_refused(dense_model: Make) -> None:
    with pytest.raises(ValueError, match="the text has 1 tokens"):
        perplexity(dense_model(), torch.zeros(1, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="window=1 scores nothing"):
        perplexity(dense_model(), torch.zeros(9, dtype=torch.long), 1, window=1)


def test_the_unigram_model_of_a_uniform_text_has_the_size_of_its_vocabulary() -> None:
    ids = torch.arange(50).repeat(1000)
    assert unigram_perplexity(ids, ids, 50) == pytest.approx(50)
