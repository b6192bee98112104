"""Sequences that a `Decoder` writes side by side, and that come and go between its steps.

A step reads the weights once for all of them. What a sequence says does not depend on those beside it, nor on when it
came: sums are taken in the same order however its tokens are cut into steps, and its random numbers are its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from torch import Tensor

from sparse_bitnet import _native
from sparse_bitnet.engine.sampling import Sampling

if TYPE_CHECKING:
    from sparse_bitnet.engine.decoder import Decoder

CHUNK = 256  # tokens of prompts in a step: what is between layers stays in caches, and no text waits for a long prompt


@dataclass(eq=False)
class Writing:
    """A sequence: `ids` are its prompt and what is written so far, up to `end` or a token of `stop`.

    cache  keys and values of what is read so far; None when it has left its batch, as they take most of the memory
    """

    ids: list[int]
    end: int
    sampling: Sampling
    stop: Collection[int]
    cache: _native.Cache | None
    random: Random
    is_done: bool = False


class Batch:
    """Not for several threads at a time: who steps it also adds and drops."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._writings: list[Writing] = []

    def __len__(self) -> int:
        return len(self._writings)

    def add(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, stop: Collection[int] = ()
    ) -> Writing:
        """Begin a sequence with the next step; ValueError for a prompt that cannot be, or where there is no room."""
        self._decoder.check(prompt, max_new_tokens)
        end = len(prompt) + max_new_tokens
        cache = self._decoder.new_cache(end) if max_new_tokens else None
        writing = Writing(list(prompt), end, sampling, stop, cache, sampling.random())
        if max_new_tokens:
            self._writings.append(writing)
        return writing

    def drop(self, writing: Writing) -> None:
        """Leave a sequence where it is; one that is done or dropped already stays so."""
        if writing in self._writings:
            self._writings.remove(writing)
            writing.cache = None

    def step(self) -> list[tuple[Writing, int | ValueError]]:
        """Each sequence goes on by a token, and the prompts among them by CHUNK together, the oldest first.

        What was written, in the order of the sequences; ValueError for one that cannot go on. Those that end leave.
        """
        room, steps = CHUNK, []
        for writing in self._writings:
            assert writing.cache is not None
            read = writing.cache.length
            unread = len(writing.ids) - read
            count = 1 if unread == 1 else min(unread, room)
            room -= 0 if unread == 1 else count
            if count:
                steps.append((writing, writing.cache, writing.ids[read : read + count]))
        if not steps:
            return []
        rows = self._decoder.forward([cache for _, cache, _ in steps], [tokens for *_, tokens in steps])
        written = []
        for (writing, cache, _), logits in zip(steps, rows, strict=True):
            if cache.length == len(writing.ids):
                written.append((writing, self._write(writing, logits)))
        return written

    def _write(self, writing: Writing, logits: Tensor) -> int | ValueError:
        try:
            token = _sample(logits, writing)
        except ValueError as error:
            writing.is_done = True
            self.drop(writing)
            return error
        writing.ids.append(token)
        if token in writing.stop or len(writing.ids) == writing.end:
            writing.is_done = True
            self.drop(writing)
        return token


def _sample(logits: Tensor, writing: Writing) -> int:
    sampling = writing.sampling
    penalised = writing.ids if sampling.repetition_penalty != 1 else []
    return _native.sample(
        logits.data_ptr(), len(logits), sampling.temperature, sampling.top_k, sampling.top_p,
        sampling.repetition_penalty, penalised, writing.random.random() if sampling.temperature else 0.0,
    )  # fmt: skip
