"""Docstrings as the house writes them, for mkdocstrings: aligned lists of names become Markdown lists."""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"(\S+(?: / \S+)*) {2,}(\S.*)")


class AlignedLists(griffe.Extension):
    """A paragraph of `name   words` lines, those that go on indented further, is a list."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "\n\n".join(map(_as_list, obj.docstring.value.split("\n\n")))


def _as_list(paragraph: str) -> str:
    entries: list[str] = []
    for line in paragraph.splitlines():
        match = ENTRY.fullmatch(line)
        if match is not None:
            entries.append(f"* `{match[1]}`: {match[2]}")
        elif entries and line.startswith("    "):
            entries[-1] += f" {line.strip()}"
        else:
            return paragraph
    return "\n".join(entries)
