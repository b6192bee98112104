"""Token ids in blocks of equal length, documents joined end to end, each closed by the end-of-text token.

Prepared once as a memory-mapped file, or cut from the stream of documents while training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from sparse_bitnet.checkpoint.directory import read_json, whole_directory, write_text
from sparse_bitnet.corpus.documents import TextSource

TOKENS, META = "tokens.bin", "meta.json"
DOCUMENTS_A_BATCH = 64
CHARACTERS_A_PIECE = 200_000  # a long document is tokenized in pieces, cut at line ends, so that progress is seen


@dataclass(frozen=True)
class TokenFile:
    """A prepared corpus: `directory` holds the token ids and their description."""

    directory: Path
    tokens: int
    bytes: int
    dtype: str

    def open(self) -> np.memmap[Any, Any]:
        """Token ids [tokens], mapped, not read."""
        return np.memmap(self.directory / TOKENS, dtype=self.dtype, mode="r", shape=(self.tokens,))


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Non-overlapping blocks of a token file: `input_ids` and `labels` [block] int64; the remainder is left out."""

    def __init__(self, file: TokenFile, block: int, origin: str = "the corpus") -> None:
        if file.tokens < block:
            raise ValueError(
                f"{origin} has {file.tokens:,} tokens, fewer than one block of {block:,}: "
                f"give more text or a smaller training.block_size"
            )
        self.file, self.block = file, block
        self.ids = file.open()

    def __len__(self) -> int:
        return self.file.tokens // self.block

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return _example(self.ids[index * self.block : (index + 1) * self.block])


class StreamedBlocks(IterableDataset[dict[str, Tensor]]):
    """The same blocks cut from the stream of documents, over and over; nothing is stored or shuffled."""

    def __init__(self, source: TextSource, tokenizer: PreTrainedTokenizerBase, block: int) -> None:
        self.source, self.tokenizer, self.block = source, tokenizer, block

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            left, seen = np.empty(0, dtype=np.int64), False
            for ids, _ in _token_batches(self.source.documents(), self.tokenizer):
                left = np.concatenate([left, ids])
                for start in range(0, len(left) - self.block + 1, self.block):
                    seen = True
                    yield _example(left[start : start + self.block])
                left = left[len(left) // self.block * self.block :]
            if not seen:
                raise ValueError(f"the corpus has fewer tokens than one block of {self.block:,}: give more text")


def prepare_tokens(source: TextSource, tokenizer: PreTrainedTokenizerBase, cache: Path) -> TokenFile:
    """The corpus as a token file below `cache`: made once for the same files and tokenizer, then found again.

    ValueError where the corpus is empty.
    """
    directory = cache / _fingerprint(source, tokenizer)
    if not (directory / META).exists():
        with whole_directory(directory) as staging:
            _write_tokens(source, tokenizer, staging)
    meta = read_json(directory / META)
    return TokenFile(directory, meta["tokens"], meta["bytes"], meta["dtype"])


def tokenize_text(text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray[Any, Any]:
    """Token ids [tokens] int64 of one text, no special tokens added."""
    pieces = _pieces(text)
    encoded = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False)["input_ids"] if text else []
    return np.concatenate([np.empty(0, np.int64), *(np.asarray(ids, np.int64) for ids in encoded)])


def _write_tokens(source: TextSource, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    tokens = size = 0
    with (directory / TOKENS).open("wb") as file:
        for ids, count in _token_batches(source.documents(), tokenizer):
            file.write(ids.astype(dtype).tobytes())
            tokens, size = tokens + len(ids), size + count
    if not tokens:
        raise ValueError(f"the corpus is empty: no text in {', '.join(source.files) or source.dataset}")
    write_text(directory / META, json.dumps({"tokens": tokens, "bytes": size, "dtype": dtype}))


def _token_batches(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray[Any, Any], int]]:
    """Token ids of some documents, each closed by the end of text, and the bytes of their text."""
    end: Any = tokenizer.eos_token_id
    pieces = ((piece, last) for document in documents for piece, last in _marked_pieces(document))
    while batch := list(islice(pieces, DOCUMENTS_A_BATCH)):
        texts = [piece for piece, _ in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        ids: list[int] = []
        for tokens, (_, last) in zip(encoded, batch, strict=True):
            ids.extend(tokens)
            if last and end is not None:
                ids.append(end)
        yield np.asarray(ids, dtype=np.int64), sum(len(text.encode()) for text in texts)


def _marked_pieces(document: str) -> Iterator[tuple[str, bool]]:
    pieces = _pieces(document)
    for index, piece in enumerate(pieces):
        yield piece, index == len(pieces) - 1


def _pieces(document: str) -> list[str]:
    """The document cut after line ends into pieces of about CHARACTERS_A_PIECE."""
    pieces, start = [], 0
    while start < len(document):
        cut = document.find("\n", start + CHARACTERS_A_PIECE) + 1
        pieces.append(document[start : cut or None])
        start = cut or len(document)
    return pieces


def _example(ids: np.ndarray[Any, Any]) -> dict[str, Tensor]:
    tokens = torch.from_numpy(ids.astype(np.int64))
    return {"input_ids": tokens, "labels": tokens}


def _fingerprint(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with the tokenizer, and with the name, size or time of any file."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in source.paths()]
    vocabulary = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    identity = [stats, source.dataset, source.split, source.text_field, vocabulary, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
