"""Sequences that come and go between steps: each says what it says alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("sparse_bitnet._native", reason="the native kernels are not built")

from sparse_bitnet.engine.batch import CHUNK, Batch, Writing
from sparse_bitnet.engine.decoder import Decoder
from sparse_bitnet.engine.sampling import Sampling

Packed = Callable[..., tuple[PreTrainedModel, Path]]
SAMPLING = Sampling(temperature=1.0, top_k=30, repetition_penalty=1.1, seed=11)


@pytest.fixture
def decoder(packed: Packed) -> Decoder:
    return Decoder(packed(max_position_embeddings=2048)[1], threads=1)


def ids_of(length: int) -> list[int]:
    return torch.randint(1, 320, (length,)).tolist()


def alone(decoder: Decoder, prompt: list[int], new: int) -> list[int]:
    return [token for _, token in decoder.generate([prompt], new, SAMPLING)]


def test_who_comes_late_says_what_it_says_alone(decoder: Decoder) -> None:
    """One joins every second step, with prompts longer than what a step takes; one is dropped on the way."""
    prompts = [ids_of(length) for length in (4, 700, 1, 300, 40)]
    batch, written = Batch(decoder), {}
    numbers: dict[Writing, int] = {}
    dropped = None
    for step in range(60):
        if step % 2 == 0 and len(numbers) < len(prompts):
            number = len(numbers)
            numbers[batch.add(prompts[number], 20, SAMPLING)] = number
            written[number] = []
        for writing, token in batch.step():
            written[numbers[writing]].append(token)
        if step == 7:
            dropped = next(writing for writing, number in numbers.items() if number == 2)
            batch.drop(dropped)
            batch.drop(dropped)
    assert len(batch) == 0
    assert dropped is not None and not dropped.is_done
    for number, prompt in enumerate(prompts):
        expected = alone(decoder, prompt, 20)
        assert written[number] == (expected[: len(written[2])] if number == 2 else expected)
    assert 0 < len(written[2]) < 20


def test_a_text_goes_on_while_a_long_prompt_is_read(decoder: Decoder) -> None:
    batch = Batch(decoder)
    short = batch.add(ids_of(3), 50, SAMPLING)
    batch.step()
    long = batch.add(ids_of(3 * CHUNK + 1), 5, SAMPLING)
    other = batch.add(ids_of(2), 5, SAMPLING)
    steps = [[writing for writing, _ in batch.step()] for _ in range(4)]
    assert steps == [[short], [short], [short], [short, long, other]]
    assert long.cache.length == 3 * CHUNK + 1


def test_logits_that_are_no_numbers_end_one_sequence_alone(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(decoder)
    good, bad = batch.add([5, 6], 4, SAMPLING), batch.add([7], 4, SAMPLING)
    forward = decoder.forward

    def spoiled(caches: list, tokens: list) -> torch.Tensor:
        rows = forward(caches, tokens)
        rows[caches.index(bad.cache) if bad.cache in caches else len(rows) :] = float("nan")
        return rows

    monkeypatch.setattr(decoder, "forward", spoiled)
    first = dict(batch.step())
    assert isinstance(first[bad], ValueError) and bad.is_done
    assert [writing for _ in range(3) for writing, _ in batch.step()] == [good] * 3
    assert len(batch) == 0 and good.is_done
    assert good.ids[2:] == alone(decoder, [5, 6], 4)


def test_a_prompt_of_one_token_that_ends_texts_is_gone_on_from(decoder: Decoder) -> None:
    batch = Batch(decoder)
    writing = batch.add([0], 3, SAMPLING, stop=[0])
    assert not writing.is_done
    assert [found for found, _ in batch.step()] == [writing]
    assert batch.step() or writing.is_done


def test_a_sequence_that_ends_gives_its_cache_back(decoder: Decoder) -> None:
    batch = Batch(decoder)
    short, dropped, long = (batch.add([5, 6], new, SAMPLING) for new in (1, 9, 9))
    batch.step()
    batch.drop(dropped)
    assert (short.cache, dropped.cache) == (None, None)
    assert long.cache is not None and long.cache.length == 2


def test_a_seed_and_its_negative_are_two() -> None:
    assert Sampling(seed=-7).random().random() != Sampling(seed=7).random().random()
    assert Sampling(seed=7).random().random() == Sampling(seed=7).random().random()


def test_nothing_to_do_is_nothing_done(decoder: Decoder) -> None:
    batch = Batch(decoder)
    batch.add([1], 0, SAMPLING)
    assert len(batch) == 0 and batch.step() == []
    with pytest.raises(ValueError, match="the prompt is empty"):
        batch.add([], 3, SAMPLING)
