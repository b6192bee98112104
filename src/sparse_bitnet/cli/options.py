"""Options that several commands share."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

STOPPED = 128 + signal.SIGTERM  # exit status of a run that SIGTERM ended early, with a checkpoint
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures to FILE as JSON.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]


def write_json(file: Path | None, figures: Any) -> None:
    """Write `figures` to `file`, if one is wanted."""
    from sparse_bitnet.checkpoint.directory import write_text

    if file is not None:
        write_text(file, json.dumps(figures, indent=2) + "\n")


def choose_device(device: str) -> str:
    """`auto` -> cuda where there is one, else cpu; ValueError for a device that is not here."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return device
