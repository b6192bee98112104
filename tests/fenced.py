"""The fenced blocks of Markdown files: what README and docs tell their readers to type."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]*)\")?\n(.*?)^```", re.DOTALL | re.MULTILINE)
SMALL = {
    "steps: 400": "steps: 4",
    "block_size: 256": "block_size: 32",
    "batch_size: 16": "batch_size: 2",
    "vocab_size: 8192": "vocab_size: 300",
    "eval_blocks: 200": "eval_blocks: 4",
    "log_every: 10": "log_every: 2",
}


@dataclass(frozen=True)
class Block:
    """A fenced block; `code` ends with a line end."""

    language: str
    title: str
    code: str

    @property
    def commands(self) -> list[str]:
        """Its lines, those joined that a backslash continues."""
        return self.code.replace("\\\n", " ").splitlines()


def blocks(markdown: str, *languages: str) -> list[Block]:
    """In their order; of all languages where none is named."""
    found = [Block(*match.groups(default="")) for match in FENCE.finditer(markdown)]
    return [block for block in found if not languages or block.language in languages]


def make_small(settings: Path) -> None:
    """Settings that `init` wrote, for a run of a few steps."""
    text = settings.read_text(encoding="utf-8")
    for default, value in SMALL.items():
        assert default in text
        text = text.replace(default, value)
    settings.write_text(text, encoding="utf-8")
