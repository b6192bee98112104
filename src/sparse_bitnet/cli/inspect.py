"""`sparse-bitnet inspect MODEL`"""

from __future__ import annotations

from typing import Annotated

import typer

from sparse_bitnet.cli.options import JsonFile, write_json


def inspect(
    model: Annotated[str, typer.Argument(help="Model directory, latent or packed.")],
    json: JsonFile = None,
) -> None:
    """Print a table of the layers and verify the n:m constraint; exit status 1 where it is violated."""
    from sparse_bitnet import summary
    from sparse_bitnet.checkpoint.loading import open_model

    figures = summary(open_model(model))
    print(figures)
    write_json(json, figures.to_dict())
    if not figures.holds_pattern:
        raise typer.Exit(1)
