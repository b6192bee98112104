"""`sparse-bitnet export gguf MODEL FILE`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_bitnet.cli.options import JsonFile, write_json

app = typer.Typer(help="Write a model for other programs.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Write a model for other programs."""


@app.command()
def gguf(
    model: Annotated[str, typer.Argument(help="Checkpoint of `train` or `convert`.")],
    output: Annotated[Path, typer.Argument(help="File to write; must not exist.")],
    type: Annotated[
        str,
        typer.Option(help="Of the ternary weights: tq2_0, tq1_0, q2_0, q4_0, f16; auto: tq2_0, or q4_0."),
    ] = "auto",
    json: JsonFile = None,
) -> None:
    """A file for llama.cpp, ollama, LM Studio: stock ones, no plugin. Qwen2, Qwen3 and Llama models."""
    from sparse_bitnet.interop.gguf import export_gguf

    written = export_gguf(model, output, type)
    told = ", ".join(f"{count} {kind}" for kind, count in written.tensors.items())
    print(f"{output}: {written.bytes / 1e6:,.1f} MB, tensors {told}")
    for remark in written.remarks:
        print(remark)
    write_json(json, {"file": str(output), "bytes": written.bytes, "tensors": written.tensors})
