"""`sparse-bitnet convert MODEL OUTPUT`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_bitnet.cli.options import JsonFile, write_json


def convert(
    model: Annotated[str, typer.Argument(help="Latent checkpoint, as `train` leaves it.")],
    output: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    format: Annotated[
        str, typer.Option(help="i2 (2 bits), t5 (1.6), g4 (1.5; 1.25 for sign 2:4 and 3:4); auto: g4, or i2.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of embedding, norms and head: float32, bfloat16, float16; auto keeps theirs.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    json: JsonFile = None,
) -> None:
    """Pack a trained model for inference."""
    import torch

    from sparse_bitnet import convert as pack
    from sparse_bitnet import summary
    from sparse_bitnet.checkpoint.directory import copy_tokenizer, whole_directory
    from sparse_bitnet.checkpoint.loading import open_model
    from sparse_bitnet.formats import get_format
    from sparse_bitnet.nn.layer import PackedLayer
    from sparse_bitnet.nn.stored_settings import named_layers

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype} is not one of auto, float32, bfloat16, float16")
    with whole_directory(output) as staging:
        opened = open_model(model)
        layers = [layer for _, layer in named_layers(opened)]
        if any(isinstance(layer, PackedLayer) for layer in layers):
            raise ValueError(f"{model} is packed already")
        if not layers:
            raise ValueError(
                f"{model} has no ternary layers to pack: `sparse-bitnet import {model} DIRECTORY` makes a model of it "
                f"that has, to be trained before it is packed"
            )
        packed = pack(opened, format)
        if dtype != "auto":
            packed = packed.to(getattr(torch, dtype))
        packed.save_pretrained(staging, max_shard_size=max_shard_size)
        copy_tokenizer(model, staging)
    figures = summary(packed)
    print(f"format {get_format(figures.layers[0].format)}")
    print(f"{output}: {figures.weights:,} weights at {figures.bits:.2f} bits, {100 * figures.zeros:.1f} % zeros")
    write_json(json, figures.to_dict())
