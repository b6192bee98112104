"""What several commands are called with: a dense checkpoint and a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@pytest.fixture
def dense(dense_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    dense_model().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def short_text(documents: list[str], tmp_path: Path) -> Path:
    file = tmp_path / "short.txt"
    file.write_text("".join(documents[:10]))
    return file
