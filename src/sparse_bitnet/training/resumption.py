"""What may change where a run is resumed, and what has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparse_bitnet.training.config import TrainConfig, load_config

SETTLED = ("model.", "recipe.", "tokenizer.")  # settings that a run keeps, but for the pattern

Changes = dict[str, tuple[Any, Any]]
"""`section.field` -> what it was, and is."""


def changed_settings(file: Path, config: TrainConfig) -> Changes:
    """Beside the run that wrote `file`; nothing where there is none. output_dir may change unnoticed."""
    if not file.exists():
        return {}
    before, now = (_flat(one.model_dump(mode="json")) for one in (load_config(file, []), config))
    return {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value and "." in name}


def _flat(settings: dict[str, Any], section: str = "") -> dict[str, Any]:
    """`section.field` -> value."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{section}{name}.") if isinstance(value, dict) else {f"{section}{name}": value}
    return found


def check_changes(changes: Changes) -> None:
    """ValueError for a setting that a checkpoint has settled."""
    for name, (before, now) in changes.items():
        if name.startswith(SETTLED) and name != "recipe.pattern":
            raise ValueError(
                f"{name}={now} cannot be set on a resume, as the run began with {before}: leave it, or begin "
                f"another run with another output_dir"
            )


def told(changes: Changes) -> str:
    return ", ".join(f"{name}={now} (was {before})" for name, (before, now) in changes.items())
