"""Small real things that many tests share: a corpus, a tokenizer trained on it, models of the Qwen2 type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for the network
os.environ.setdefault("HF_DATASETS_CACHE", "/nonexistent")  # files are streamed, nothing is cached

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen3MoeConfig
from transformers.utils import logging as transformers_logging

from sparse_bitnet import Recipe, prepare
from sparse_bitnet.cli.main import main
from sparse_bitnet.corpus.tokenizer import train_tokenizer
from sparse_bitnet.training.config import load_config
from sparse_bitnet.training.run import train

transformers_logging.disable_progress_bar()

WORDS = "the cat sat on a mat and the dog ran to the old red barn while rain fell over green hills".split()
SMALL: dict[str, object] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """200 documents of words in an order that a model can learn something of."""
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(0, len(WORDS) - 3, (200, 30), generator=generator).tolist()
    return [". ".join(" ".join(WORDS[i : i + 3]) for i in row) + ".\n" for row in picks]


@pytest.fixture(scope="session")
def corpus_file(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]) -> PreTrainedTokenizerBase:
    return train_tokenizer(documents, 320, 10**6)


@pytest.fixture
def dense_model() -> Callable[..., PreTrainedModel]:
    """Makes a Qwen2 model of 2 layers, 64 wide, 4 heads over 2, for 320 tokens; settings by keyword."""

    def make(**settings: object) -> PreTrainedModel:
        config = Qwen2Config(**(SMALL | {"tie_word_embeddings": True} | settings))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    return make


@pytest.fixture
def latent_model(dense_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """The same, prepared with a recipe, by default ternary 6:8."""

    def make(recipe: Recipe | None = None, **settings: object) -> PreTrainedModel:
        return prepare(dense_model(**settings), recipe or Recipe())

    return make


@pytest.fixture(scope="session")
def trained_runs(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of 6 steps, as `train` leaves them: sparse throughout, and 2:4 after a dense half."""
    root = tmp_path_factory.mktemp("runs")
    dense_first = ("recipe.pattern=2:4", "schedule.kind=dense-to-sparse")
    for name, overrides in {"sparse": (), "dense-first": dense_first}.items():
        settings = [
            f"output_dir={root / name}", f"data.files=[{corpus_file}]", f"data.validation_files=[{corpus_file}]",
            "tokenizer.vocab_size=300", "training.steps=6", "training.block_size=16", "training.batch_size=2",
            "training.warmup_steps=2", "training.log_every=1", "training.eval_every=2", "training.eval_blocks=2",
            "training.keep_checkpoints=1",
        ]  # fmt: skip
        train(load_config(None, [*settings, *overrides]))
    return [root / "sparse", root / "dense-first"]


@pytest.fixture
def mixture_model() -> Callable[..., PreTrainedModel]:
    """Makes a Qwen3-MoE model of 2 layers, 64 wide, 2 of 4 experts a token, 32 wide; settings by keyword."""

    def make(**settings: object) -> PreTrainedModel:
        experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
        config = Qwen3MoeConfig(**(SMALL | experts | settings))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    return make


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system of a given size, to fill up."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def make(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
            pytest.skip("mounting a small file system needs root")
        return disk

    yield make
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real text and tokenizers of {SHARED_DATA} are not on this machine")
    return SHARED_DATA


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """A command called as a shell calls it, in this process, for speed: `command("inspect", directory)`."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["sparse-bitnet", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        return Answer(code, *capsys.readouterr())

    return call
