"""How entries like `mlp`, `self_attn.q_proj` and `*.experts.*` name the layers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def matches_any(name: str, entries: Sequence[str]) -> bool:
    return any(matches(name, entry) for entry in entries)


def matches(name: str, entry: str) -> bool:
    """Whether `entry` is a glob over the whole name, or a run of whole segments of it."""
    return fnmatchcase(name, entry) or f".{entry}." in f".{name}."


def same_layer(name: str, stored: str) -> bool:
    """Whether one name is the other, or its end: a base model lacks the prefix that stored names carry."""
    return name == stored or stored.endswith(f".{name}") or name.endswith(f".{stored}")
