"""`sparse-bitnet init [FILE]`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    file: Annotated[Path, typer.Argument(help="Where to write the settings.")] = Path("train.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Write a commented config for `train`, with every setting in it."""
    from importlib.resources import files

    from sparse_bitnet.checkpoint.directory import write_text

    if file.exists() and not force:
        raise ValueError(f"{file} exists already: choose another name, or pass --force to replace it")
    write_text(file, files("sparse_bitnet.training").joinpath("train.yaml").read_text(encoding="utf-8"))
    print(f"wrote {file}: set data.files, then `sparse-bitnet train {file}`")
