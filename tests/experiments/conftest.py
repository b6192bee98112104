"""A corpus of a few hundred words, made by the same function as the real one, and a scale of three steps a run."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.corpus import Corpus, load, prepare
from experiments.results import Results
from experiments.settings import TOY, Scale
from experiments.tables import missing
from experiments.training import train

MICRO = replace(TOY, tokens_a_weight=(0.01,), trend_tokens=768, sequence=32, batch=8, warmup_steps=1)
PAIRS = [("the cat sat on a mat", "mat a on sat cat the"), ("the dog ran to the barn", "barn the to ran dog the")]
CHOICES = [
    ("the cat sat", ["on a mat.", "fell fell fell.", "a", "the the"], 0),
    ("rain fell over", ["hills", "green hills"], 1),
]


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions as files that lm-evaluation-harness reads through `evaluate_tasks`."""
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "pairs.jsonl").write_bytes(
        _lines([{"sentence_good": good, "sentence_bad": bad} for good, bad in PAIRS])
    )
    (directory / "choices.jsonl").write_bytes(_lines([{"query": q, "choices": c, "gold": g} for q, c, g in CHOICES]))
    return directory


@pytest.fixture(scope="session")
def corpus_directory(documents: list[str], task_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data, directory = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("corpus")
    (data / "novels").mkdir()
    (data / "eval").mkdir()
    for split, texts in (("train", documents), ("valid", documents[:5]), ("test", documents[5:10])):
        (data / "novels" / f"{split}.jsonl.xz").write_bytes(lzma.compress(_lines([{"text": text} for text in texts])))
    pairs = (task_files / "pairs.jsonl").read_bytes()
    with tarfile.open(data / "eval" / "blimp.tar.xz", "w:xz") as tar:
        member = tarfile.TarInfo("blimp/word_order.jsonl")
        member.size = len(pairs)
        tar.addfile(member, io.BytesIO(pairs))
    choices = (task_files / "choices.jsonl").read_bytes()
    (data / "eval" / "hellaswag_val.mc.jsonl.xz").write_bytes(lzma.compress(choices))
    prepare(data, directory, 320)
    return directory


@pytest.fixture(scope="session")
def corpus(corpus_directory: Path) -> Corpus:
    return load(corpus_directory, torch.device("cpu"))


@pytest.fixture(scope="session")
def micro() -> Scale:
    return MICRO


@pytest.fixture(scope="session")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Real results of the sweeps, of Table A and of the trend, three steps a run: true, of no meaning."""
    results = Results(tmp_path_factory.mktemp("results"))
    while runs := missing(MICRO, results, ["sweep", "claim", "trend-sweep", "trend"]):
        results.add(runs[0], train(runs[0], corpus, torch.device("cpu")))
    return results
