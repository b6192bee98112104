"""`sparse-bitnet export gguf MODEL FILE | hf-bitnet MODEL DIRECTORY`"""

from __future__ import annotations

from importlib.util import find_spec
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
    embedding: Annotated[str, typer.Option(help="And head: f16, or q8_0, rounded to 8 bits.")] = "f16",
    json: JsonFile = None,
) -> None:
    """A file for stock llama.cpp: Qwen2, Qwen3 and Llama models, tokenizer included."""
    if find_spec("gguf") is None:
        raise ValueError("export gguf needs the package gguf: pip install 'sparse-bitnet[gguf]'")
    from sparse_bitnet.interop.gguf import export_gguf

    written = export_gguf(model, output, type, embedding)
    told = ", ".join(f"{count} {kind}" for kind, count in written.tensors.items())
    print(f"{output}: {written.bytes / 1e6:,.1f} MB, tensors {told}")
    for remark in written.remarks:
        print(remark)
    write_json(json, {"file": str(output), "bytes": written.bytes, "tensors": written.tensors})


@app.command("hf-bitnet")
def hf_bitnet(
    model: Annotated[str, typer.Argument(help="Checkpoint of `train` or `convert`.")],
    output: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    json: JsonFile = None,
) -> None:
    """A directory for stock transformers, without this package: 2 bits a weight on disk, dense in memory."""
    from sparse_bitnet.interop.hf_bitnet import export_hf_bitnet

    size = export_hf_bitnet(model, output, max_shard_size)
    print(f"{output}: {size / 1e6:,.1f} MB, quant_method bitnet")
    write_json(json, {"directory": str(output), "bytes": size})
