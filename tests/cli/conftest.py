"""What commands are called with: a latent and a dense checkpoint, and a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def latent(latent_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    return saved(latent_model(), tokenizer, tmp_path / "latent")


@pytest.fixture
def dense(dense_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    return saved(dense_model(), tokenizer, tmp_path / "dense")


@pytest.fixture
def short_text(documents: list[str], tmp_path: Path) -> Path:
    file = tmp_path / "short.txt"
    file.write_text("".join(documents[:10]))
    return file
