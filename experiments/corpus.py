"""The text of the experiments: novels and zero-shot tasks as token ids, made once and carried where the runs are.

    python -m experiments.corpus DATA experiments/data

reads `novels/{train,valid,test}.jsonl.xz` and `eval/` below the first directory and writes, below the second, a
tokenizer trained on the training novels, the novels as uint16, the tasks, and a description with their hashes. A run
needs nothing but these files, numpy and torch: no tokenizer, no data library.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor

from sparse_bitnet.checkpoint.directory import read_json, write_text
from sparse_bitnet.corpus.tokenizer import train_tokenizer

SPLITS = ("train", "valid", "test")
END_OF_TEXT = 0
TOKENIZER, TASKS, DESCRIPTION = "tokenizer.json", "tasks.json.xz", "corpus.json"
DOCUMENTS_A_BATCH = 8


@dataclass(frozen=True)
class Item:
    """A question: token ids of the context, of each continuation, their lengths in characters, and which is right."""

    context: list[int]
    continuations: list[list[int]]
    characters: list[int]
    right: int


@dataclass(frozen=True)
class Corpus:
    """Token ids [tokens] int32 by split, bytes of text by split, questions by task."""

    ids: dict[str, Tensor]
    bytes: dict[str, int]
    tasks: dict[str, list[Item]]
    description: dict[str, Any]


def describe(directory: Path | str) -> dict[str, Any]:
    """What `prepare` wrote about the corpus in `directory`; ValueError where it is missing."""
    file = Path(directory) / DESCRIPTION
    if not file.exists():
        raise ValueError(f"{directory} holds no corpus: python -m experiments.corpus DATA {directory} makes one")
    return read_json(file)


def load(directory: Path | str, device: torch.device) -> Corpus:
    """What `prepare` left in `directory`, the training text on `device`; ValueError where it is missing or damaged."""
    directory, description, ids = Path(directory), describe(directory), {}
    for split in SPLITS:
        raw = lzma.decompress((directory / _file(split)).read_bytes())
        if hashlib.sha256(raw).hexdigest() != description["sha256"][split]:
            raise ValueError(f"{directory / _file(split)} is not the file that {DESCRIPTION} describes: copy it again")
        ids[split] = torch.from_numpy(np.frombuffer(raw, dtype=np.uint16).astype(np.int32))
    ids["train"] = ids["train"].to(device)
    stored = json.loads(lzma.decompress((directory / TASKS).read_bytes()))
    tasks = {name: [Item(*item) for item in items] for name, items in stored.items()}
    return Corpus(ids, description["bytes"], tasks, description)


def prepare(data: Path, directory: Path, vocabulary: int = 16_384, at_most: int | None = None) -> None:
    """Write the corpus; `at_most` documents a split and questions a task, all by default."""
    directory.mkdir(parents=True, exist_ok=True)
    novels = data / "novels"
    made = train_tokenizer(_texts(novels / "train.jsonl.xz", at_most), vocabulary, sample_bytes=200_000_000)
    tokenizer: Any = made.backend_tokenizer  # type: ignore[attr-defined]
    tokenizer.save(str(directory / TOKENIZER))
    assert made.eos_token_id == END_OF_TEXT and len(made) <= vocabulary
    description: dict[str, Any] = {"tokens": {}, "bytes": {}, "sha256": {}, "vocabulary": len(made)}
    for split in SPLITS:
        texts = list(_texts(novels / f"{split}.jsonl.xz", at_most))
        raw = _encode(tokenizer, texts).tobytes()
        compression = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lp": 1, "pb": 1}]
        (directory / _file(split)).write_bytes(lzma.compress(raw, lzma.FORMAT_XZ, filters=compression))
        description["tokens"][split] = len(raw) // 2
        description["bytes"][split] = sum(len(text.encode()) for text in texts)
        description["sha256"][split] = hashlib.sha256(raw).hexdigest()
    tasks = {name: items[:at_most] for name, items in _tasks(tokenizer, data / "eval", at_most).items()}
    stored = {name: [list(vars(item).values()) for item in items] for name, items in tasks.items()}
    (directory / TASKS).write_bytes(lzma.compress(json.dumps(stored, separators=(",", ":")).encode()))
    write_text(directory / DESCRIPTION, json.dumps(description, indent=2) + "\n")


def _file(split: str) -> str:
    return f"{split}.uint16.xz"


def _texts(file: Path, at_most: int | None) -> Iterator[str]:
    for row in list(_rows(file))[:at_most]:
        yield row["text"]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray[Any, Any]:
    """Token ids [tokens] uint16 of the documents, each closed by the end of text."""
    found = []
    for start in range(0, len(texts), DOCUMENTS_A_BATCH):
        for encoding in tokenizer.encode_batch(texts[start : start + DOCUMENTS_A_BATCH], add_special_tokens=False):
            found.append(np.asarray([*encoding.ids, END_OF_TEXT], dtype=np.uint16))
    return np.concatenate(found)


def _tasks(tokenizer: Tokenizer, directory: Path, at_most: int | None) -> dict[str, list[Item]]:
    """BLiMP, one task a set of minimal pairs, and HellaSwag; a question without context begins with the end of text."""
    tasks: dict[str, list[Item]] = {}
    with tarfile.open(directory / "blimp.tar.xz") as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            file = tar.extractfile(member)
            if file is None or not member.name.endswith(".jsonl"):
                continue
            rows = [json.loads(line) for line in file.read().splitlines()[:at_most]]
            pairs = [(row["sentence_good"], row["sentence_bad"]) for row in rows]
            tasks[f"blimp/{Path(member.name).stem}"] = [_item(tokenizer, "", list(pair), 0) for pair in pairs]
    rows = list(_rows(directory / "hellaswag_val.mc.jsonl.xz"))[:at_most]
    tasks["hellaswag"] = [_item(tokenizer, row["query"], row["choices"], row["gold"]) for row in rows]
    return tasks


def _item(tokenizer: Tokenizer, query: str, choices: list[str], right: int) -> Item:
    """The whole text is cut where its context alone would end, as lm-evaluation-harness does."""
    if not query:
        continuations = [tokenizer.encode(choice, add_special_tokens=False).ids for choice in choices]
        return Item([END_OF_TEXT], continuations, list(map(len, choices)), right)
    context = tokenizer.encode(query, add_special_tokens=False).ids
    whole = [tokenizer.encode(f"{query} {choice}", add_special_tokens=False).ids for choice in choices]
    return Item(context, [ids[len(context) :] for ids in whole], list(map(len, choices)), right)


if __name__ == "__main__":
    typer.run(prepare)
