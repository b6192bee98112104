"""Options that several commands share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

STOPPED = 128  # plus the signal: exit status of a run that was ended early, with a checkpoint


def _writable(file: Path | None) -> Path | None:
    """`file`, before any work is done for it; ValueError where it could not be written after that."""
    if file is None or (file.parent.is_dir() and os.access(file.parent, os.W_OK) and not file.is_dir()):
        return file
    if file.is_dir():
        raise ValueError(f"--json {file} is a directory: name a file")
    raise ValueError(f"--json {file} cannot be written: {file.parent} is no directory that may be written to")


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the figures to FILE as JSON.", callback=_writable),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]

ENGINES = ("auto", "native", "transformers")
Engine = Annotated[
    str, typer.Option(help="native (packed Qwen2, Qwen3, Llama; CPU), transformers, or auto: native where it can.")
]
Head = Annotated[
    str | None,
    typer.Option(help="Of the native engine: int8, as by default, or stored for the floats in the file, slower."),
]


def refuse_native_options(reason: str | None, **given: Any) -> None:
    """ValueError where options of the native engine are given, by their names, and it cannot run, for that reason."""
    for name, value in given.items():
        if value is not None and reason is not None:
            raise ValueError(f"--{name.replace('_', '-')} is of the native engine, and this is transformers: {reason}")


def write_json(file: Path | None, figures: Any) -> None:
    """Write `figures` to `file`, if one is wanted."""
    from sparse_bitnet.checkpoint.directory import write_text

    if file is not None:
        write_text(file, json.dumps(figures, indent=2) + "\n")


def write_figures(file: Path | None, result: dict[str, Any], seed: int) -> None:
    """Write what was measured to `file`, if one is wanted, with what made it."""
    from sparse_bitnet.checkpoint.provenance import provenance

    write_json(file, {**provenance(), "seed": seed, **result})


def numbers(name: str, text: str) -> tuple[int, ...]:
    """`1,64` -> (1, 64); ValueError, with the option's name, for what is no positive number."""
    if not all(part.isdigit() and int(part) for part in text.split(",")):
        raise ValueError(f"--{name} {text}: give positive numbers, separated by commas")
    return tuple(map(int, text.split(",")))


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


def why_not_native(engine: str, model: str, device: str) -> str | None:
    """None where the native engine is to run `model`; ValueError where it is asked for and cannot."""
    from sparse_bitnet.engine.architecture import obstacle

    if engine not in ENGINES:
        raise ValueError(f"--engine {engine}: choose from {', '.join(ENGINES)}")
    if engine == "transformers":
        return "--engine transformers"
    reason = f"it runs on a CPU, not on {device}" if device != "cpu" else obstacle(model)
    if engine == "native" and reason is not None:
        raise ValueError(f"--engine native: {reason}")
    return reason
