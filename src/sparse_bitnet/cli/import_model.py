"""`sparse-bitnet import MODEL OUTPUT`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_bitnet.cli.options import Device, JsonFile, choose_device, write_json

CRITERIA = ("magnitude", "activation")


def import_model(
    model: Annotated[str, typer.Argument(help="Dense checkpoint, or one of quant_method bitnet: directory or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Directory to write, a latent checkpoint; must not exist.")],
    pattern: Annotated[str, typer.Option(help="n:m of the mask; 8:8 keeps all.")] = "6:8",
    values: Annotated[str, typer.Option(help="ternary, sign, or full (n:m alone).")] = "ternary",
    activations: Annotated[str, typer.Option(help="int8, int4, none; auto: none for full values, else int8.")] = "auto",
    criterion: Annotated[
        str, typer.Option(help="What chooses the starting mask: magnitude, or activation (|W| times its input's norm).")
    ] = "magnitude",
    calibration: Annotated[
        list[str] | None, typer.Option(help="Text for --criterion activation; file or directory, repeatable.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="How many of its tokens are read.")] = 128 * 2048,
    text: Annotated[list[str] | None, typer.Option(help="Text for perplexity before and after; repeatable.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens a window, of both texts.")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 4,
    text_field: Annotated[str, typer.Option(help="Column of jsonl and parquet that holds the text.")] = "text",
    skip_indivisible: Annotated[
        bool, typer.Option("--skip-indivisible", help="Leave layers dense whose width m does not divide.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Make somebody else's model one to train and pack here; say what n:m and ternary weights do to it."""
    if criterion not in CRITERIA:
        raise ValueError(f"--criterion {criterion} is not one of {', '.join(CRITERIA)}")
    if (criterion == "activation") != bool(calibration):
        raise ValueError("--criterion activation and --calibration FILE need each other")
    if activations == "auto":
        activations = "none" if values == "full" else "int8"
    import torch

    from sparse_bitnet import Recipe, summary
    from sparse_bitnet.checkpoint.directory import CONFIG, copy_tokenizer, read_json, whole_directory
    from sparse_bitnet.checkpoint.provenance import provenance
    from sparse_bitnet.corpus.documents import TextSource
    from sparse_bitnet.corpus.token_blocks import tokenize_text
    from sparse_bitnet.corpus.tokenizer import load_tokenizer
    from sparse_bitnet.evaluation.perplexity import perplexity
    from sparse_bitnet.interop.foreign import foreign_directory, import_stages

    recipe = Recipe(pattern, values=values, activations=activations)  # type: ignore[arg-type]
    target = choose_device(device)
    directory = foreign_directory(model)

    def tokens(files: list[str]) -> tuple[torch.Tensor, int]:
        joined = "\n\n".join(TextSource(tuple(files), text_field=text_field).documents())
        return torch.from_numpy(tokenize_text(joined, load_tokenizer(str(directory)))), len(joined.encode())

    scored = tokens(text) if text else None
    batches = None
    if calibration:
        ids = tokens(calibration)[0][:calibration_tokens]
        if not len(ids):
            raise ValueError(f"--calibration {', '.join(calibration)} holds no token: give more text")
        length = min(window, len(ids), read_json(directory / CONFIG).get("max_position_embeddings") or window)
        windows = ids[: len(ids) // length * length].view(-1, length).split(batch_size)  # [B, L] each
        batches = ({"input_ids": batch.to(target), "use_cache": False} for batch in windows)
    scores: dict[str, Any] = {}
    with whole_directory(output) as staging:
        imported = None
        for stage, imported in import_stages(
            directory, recipe, "skip" if skip_indivisible else "raise", batches, target
        ):
            if scored is not None:
                ids, count = scored
                score = perplexity(imported, ids, count, window, batch_size)
                print(f"{stage:<14} {score}", flush=True)
                scores[stage] = score.to_dict()
        assert imported is not None
        imported.save_pretrained(staging, max_shard_size=max_shard_size)
        copy_tokenizer(directory, staging)
    figures = summary(imported)
    print(
        f"{output}: {len(figures.layers)} layers, {figures.weights:,} weights, {100 * figures.zeros:.1f} % zeros, "
        f"{figures.other_parameters:,} other parameters; {recipe.pattern}, {values}, starting mask by {criterion}"
    )
    settings = {"source": model, **recipe.to_dict(), "criterion": criterion, "calibration": calibration, "text": text}
    write_json(json, {**provenance(), **settings, "perplexity": scores, "summary": figures.to_dict()})
