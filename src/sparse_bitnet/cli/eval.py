"""`sparse-bitnet eval ppl MODEL --text FILE | eval tasks MODEL --tasks FILE`"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any

import typer

from sparse_bitnet.cli.options import Device, JsonFile, choose_device, write_json

app = typer.Typer(help="Evaluate a model.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Evaluate a model."""


@app.command()
def ppl(
    model: Annotated[str, typer.Argument(help="Any causal language model: a directory or a Hub id.")],
    text: Annotated[
        list[str], typer.Option(help="File or directory (text, jsonl, parquet; .xz, .gz, .zst); repeatable.")
    ],
    window: Annotated[int, typer.Option(help="Tokens a window; windows do not overlap.")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 4,
    text_field: Annotated[str, typer.Option(help="Column of jsonl and parquet that holds the text.")] = "text",
    separator: Annotated[str, typer.Option(help="Between documents.")] = "\n\n",
    bos: Annotated[bool, typer.Option("--bos", help="Begin each window with the tokenizer's BOS token.")] = False,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Token perplexity, and bits per byte, on text."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from sparse_bitnet.checkpoint.loading import open_model
    from sparse_bitnet.corpus.documents import TextSource
    from sparse_bitnet.corpus.token_blocks import tokenize_text
    from sparse_bitnet.corpus.tokenizer import load_tokenizer
    from sparse_bitnet.evaluation.perplexity import perplexity

    joined = separator.join(TextSource(tuple(text), text_field=text_field).documents())
    language_model, tokenizer = open_model(model, device=choose_device(device)), load_tokenizer(model)
    begin: Any = tokenizer.bos_token_id if bos else None
    if bos and begin is None:
        raise ValueError(f"--bos: the tokenizer of {model} has no token that begins a text")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scoring", total=1.0)
        result = perplexity(
            language_model,
            torch.from_numpy(tokenize_text(joined, tokenizer)),
            text_bytes=len(joined.encode()),
            window=window,
            batch_size=batch_size,
            begin=begin,
            progress=lambda share: bar.update(task, completed=share),
        )
    print(result)
    write_json(json, {"model": model, "text": text, **result.to_dict()})


@app.command()
def tasks(
    model: Annotated[str, typer.Argument(help="Any causal language model: a directory or a Hub id.")],
    tasks: Annotated[
        list[str],
        typer.Option(
            help="File or directory of questions (.jsonl; .xz, .gz, .zst), or a name of the harness; repeatable."
        ),
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Questions a task; all without it.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 8,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Zero-shot accuracy by lm-evaluation-harness."""
    if find_spec("lm_eval") is None:
        raise ValueError("eval tasks needs the package lm-eval: pip install 'sparse-bitnet[tasks]'")
    from sparse_bitnet.checkpoint.loading import open_model
    from sparse_bitnet.checkpoint.provenance import provenance
    from sparse_bitnet.corpus.tokenizer import load_tokenizer
    from sparse_bitnet.evaluation.tasks import evaluate_tasks

    opened = open_model(model, device=choose_device(device))
    results = evaluate_tasks(opened, load_tokenizer(model), tasks, limit, batch_size)
    print(results)
    write_json(json, {**provenance(), "model": model, "limit": limit, **results.to_dict()})
