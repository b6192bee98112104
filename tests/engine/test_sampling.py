"""The choice of a token: the probabilities of transformers' own processors, told by sweeping the random number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sparse_bitnet.engine.sampling import Sampling

_native = pytest.importorskip("sparse_bitnet._native", reason="the native kernels are not built")

DRAWS = 20_000


def draw(logits: Tensor, sampling: Sampling, seen: list[int], uniform: float) -> int:
    worked_in = logits.clone()
    return _native.sample(
        worked_in.data_ptr(), len(logits), sampling.temperature, sampling.top_k, sampling.top_p,
        sampling.repetition_penalty, seen, uniform,
    )  # fmt: skip


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0), Sampling(0.7), Sampling(1.5, top_k=5), Sampling(1.0, top_k=1000), Sampling(0.9, top_p=0.6),
        Sampling(0.8, top_k=10, top_p=0.9), Sampling(1.0, top_p=1e-9), Sampling(1.0, repetition_penalty=1.7),
        Sampling(0.8, 12, 0.8, 0.6),
    ],
)  # fmt: skip
def test_probabilities_are_those_of_transformers(sampling: Sampling) -> None:
    logits, seen = torch.randn(40) * 2, [3, 3, 17, 39]
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    expected = processors(torch.tensor([seen]), logits[None].clone())[0].softmax(-1)
    found = torch.zeros(40)
    for number in range(DRAWS):
        found[draw(logits, sampling, seen, (number + 0.5) / DRAWS)] += 1 / DRAWS
    assert (found - expected).abs().max() < 1.5 / DRAWS + 1e-4  # fp32 sums of counts, and an end of each interval


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999999])
def test_the_likeliest_of_a_large_vocabulary_are_those_of_a_whole_sort(top_p: float) -> None:
    logits = (torch.randn(150_000, dtype=torch.float64) * 2).float()
    tokens = logits.sort(descending=True, stable=True).indices
    weights = (logits[tokens].double() - logits.max()).exp()
    count = int((weights.cumsum(0) < top_p * weights.sum()).sum()) + 1
    kept = weights[:count] / weights[:count].sum()
    for share in (0.001, 0.3, 0.77, 0.999):
        expected = int(tokens[int((kept.cumsum(0) <= share).sum())])
        assert draw(logits, Sampling(1.0, top_p=top_p), [], share) == expected


def test_the_likeliest_of_equals_is_the_first() -> None:
    logits = torch.tensor([1.0, 4.0, -2.0, 4.0])
    assert draw(logits, Sampling(), [], 0.99) == 1
    assert draw(logits, Sampling(repetition_penalty=2.0), [1, 1], 0.0) == 3


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(damage: float) -> None:
    for sampling in (Sampling(), Sampling(0.8, top_k=2)):
        with pytest.raises(ValueError, match="the logits are not numbers"):
            draw(torch.tensor([0.0, damage, 1.0]), sampling, [], 0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
        {"repetition_penalty": 0.0}, {"repetition_penalty": 1e9}, {"top_k": 2**31}, {"seed": 2**64},
        {"seed": -(2**63) - 1},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        Sampling(**settings)
