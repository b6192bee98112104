"""A run small enough for a second or two: a model directory, a corpus, and settings that point to both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.training.config import TrainConfig, load_config


@pytest.fixture
def dense_directory(
    dense_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Path:
    directory = tmp_path / "dense"
    dense_model().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def settings(dense_directory: Path, corpus_file: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of an 8-step run with a checkpoint every 2; further ones as overrides."""

    def make(*overrides: str) -> TrainConfig:
        small = [
            f"output_dir={tmp_path / 'run'}", f"model.source={dense_directory}", f"data.files=[{corpus_file}]",
            "training.steps=8", "training.block_size=32", "training.batch_size=4", "training.warmup_steps=2",
            "training.learning_rate=3e-3", "training.save_every=2", "training.log_every=1",
        ]  # fmt: skip
        return load_config(None, [*small, *overrides])

    return make
