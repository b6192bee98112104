"""`sparse-bitnet demo`: the whole way in a few minutes on a CPU, on text that every machine has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_bitnet.cli.options import STOPPED, JsonFile, write_json

if TYPE_CHECKING:
    from sparse_bitnet.training.config import TrainConfig

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
CORPUS_BYTES = 8_000_000
VALIDATION_EVERY = 25  # one file in so many is held out
PROMPT = "def read_lines(path):\n"
NEW_TOKENS = 80
WINDOW = 128


def demo(
    directory: Annotated[Path, typer.Argument(help="Where to work; replaces an earlier demo.")] = Path("demo-run"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 400,
    json: JsonFile = None,
) -> None:
    """Train a small model on Python's own source files, pack it, open it again, evaluate it and let it write Python."""
    from sparse_bitnet.checkpoint.provenance import provenance

    print("1/4  collecting the source files of the Python standard library")
    config = demo_config(directory, steps)
    _clear(directory)
    files, size = write_corpus(directory)
    print(f"     {files} files, {size / 1e6:.1f} MB")
    print("2/4  training a ternary 6:8 model of the Qwen2 type")
    figures = _train(config)
    print("3/4  packing it, opening it again and evaluating both")
    figures |= _pack_and_evaluate(directory)
    print("4/4  letting the packed model write Python\n")
    figures |= _write_python(directory)
    _print_table(figures)
    write_json(json, {**provenance(), "seed": config.training.seed, "figures": figures})


def demo_config(directory: Path, steps: int) -> TrainConfig:
    """The settings of the demo: the `tiny` shape, a vocabulary of 2,048, 2,048 tokens a step."""
    from sparse_bitnet.training.config import TrainConfig

    return TrainConfig.model_validate(
        {
            "output_dir": str(directory / "run"),
            "tokenizer": {"vocab_size": 2048, "sample_bytes": 4_000_000},
            "data": {"files": [str(directory / "train.jsonl")]},
            "training": {
                "steps": steps,
                "block_size": WINDOW,
                "batch_size": 16,
                "learning_rate": 4e-3,
                "warmup_steps": min(40, steps),
                "save_every": max(1, steps // 2),
            },
        }
    )


def write_corpus(directory: Path) -> tuple[int, int]:
    """Write train.jsonl and valid.jsonl, a source file a line; returns how many files and bytes they hold."""
    import json
    import sysconfig

    library = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in sorted(library.rglob("*.py")) if not SKIPPED & set(path.relative_to(library).parts))
    texts: list[str] = []
    size = 0
    for path in paths:
        content = path.read_bytes()
        try:
            texts.append(content.decode("utf-8"))
        except UnicodeDecodeError:  # an old module in another encoding
            continue
        size += len(content)
        if size > CORPUS_BYTES:
            break
    if len(texts) < VALIDATION_EVERY:
        raise ValueError(f"{library} holds too few source files: this Python came without its library's sources")
    directory.mkdir(parents=True, exist_ok=True)
    for name, held_out in (("train.jsonl", False), ("valid.jsonl", True)):
        chosen = (text for index, text in enumerate(texts) if (index % VALIDATION_EVERY == 0) is held_out)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in chosen)
        (directory / name).write_text(lines, encoding="utf-8")
    return len(texts), size


def _clear(directory: Path) -> None:
    """Remove an earlier demo; ValueError where `directory` holds anything else."""
    from sparse_bitnet.checkpoint.directory import remove_directory

    ours = {"run", "packed", "train.jsonl", "valid.jsonl"}
    strangers = {path.name for path in directory.iterdir()} - ours if directory.exists() else set()
    if strangers:
        raise ValueError(f"{directory} holds {sorted(strangers)[0]}, which is not of a demo: choose another directory")
    remove_directory(directory)


def _train(config: TrainConfig) -> dict[str, Any]:
    import time

    from sparse_bitnet.training.run import train

    started = time.monotonic()
    result = train(config)
    if result.stopped_by is not None:
        raise typer.Exit(STOPPED + result.stopped_by)
    seconds = time.monotonic() - started
    logged = [event for event in result.log if "flip_rate" in event]
    return {
        "train_steps": result.steps,
        "train_seconds": seconds,
        "train_tokens_per_second": result.steps * config.training.batch_size * config.training.block_size / seconds,
        "flip_rate_first": logged[0]["flip_rate"] if logged else None,
        "flip_rate_last": logged[-1]["flip_rate"] if logged else None,
    }


def _pack_and_evaluate(directory: Path) -> dict[str, Any]:
    import torch

    from sparse_bitnet import convert, summary
    from sparse_bitnet.checkpoint.directory import copy_tokenizer, weight_files, whole_directory
    from sparse_bitnet.checkpoint.loading import open_model
    from sparse_bitnet.corpus.documents import TextSource
    from sparse_bitnet.corpus.token_blocks import tokenize_text
    from sparse_bitnet.corpus.tokenizer import load_tokenizer
    from sparse_bitnet.evaluation.perplexity import perplexity, unigram_perplexity

    latent, packed = directory / "run" / "model", directory / "packed"
    tokenizer = load_tokenizer(str(latent))

    def text_of(name: str) -> str:
        return "\n\n".join(TextSource((str(directory / name),)).documents())

    text = text_of("valid.jsonl")
    ids = torch.from_numpy(tokenize_text(text, tokenizer))
    train_ids = torch.from_numpy(tokenize_text(text_of("train.jsonl"), tokenizer))
    model = open_model(str(latent))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    before = perplexity(model, ids, len(text.encode()), window=WINDOW, batch_size=32)
    with whole_directory(packed) as staging:
        convert(model).save_pretrained(staging)
        copy_tokenizer(latent, staging)
    model = open_model(str(packed))
    after = perplexity(model, ids, len(text.encode()), window=WINDOW, batch_size=32)
    layers = summary(model)
    return {
        "parameters": parameters,
        "ternary_weights": layers.weights,
        "bits_per_weight": layers.bits,
        "zeros": layers.zeros,
        "holds_pattern": layers.holds_pattern,
        "bytes_bf16": 2 * parameters,
        "bytes_latent": sum(file.stat().st_size for file in weight_files(latent)),
        "bytes_packed": sum(file.stat().st_size for file in weight_files(packed)),
        "perplexity_unigram": unigram_perplexity(train_ids, ids, len(tokenizer)),
        "perplexity_latent": before.perplexity,
        "perplexity_packed": after.perplexity,
        "bits_per_byte_packed": after.bits_per_byte,
    }


def _write_python(directory: Path) -> dict[str, Any]:
    import time

    import torch
    from transformers import TextStreamer

    from sparse_bitnet.checkpoint.loading import open_model
    from sparse_bitnet.corpus.tokenizer import load_tokenizer

    source = str(directory / "packed")
    model: Any = open_model(source).eval()
    tokenizer = load_tokenizer(source)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    started = time.monotonic()
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=True,
        temperature=0.6,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )
    seconds = time.monotonic() - started
    return {"generate_tokens_per_second": (written.shape[1] - ids.shape[1]) / seconds}


def _print_table(figures: dict[str, Any]) -> None:
    flips = (figures["flip_rate_first"], figures["flip_rate_last"])
    rows = {
        "parameters": f"{figures['parameters']:,}, of which {figures['ternary_weights']:,} ternary 6:8",
        "bits a ternary weight": f"{figures['bits_per_weight']:.2f}",
        "size: bf16 / latent / packed": " / ".join(
            f"{figures[name] / 1e6:.2f} MB" for name in ("bytes_bf16", "bytes_latent", "bytes_packed")
        ),
        "zeros among the weights": f"{100 * figures['zeros']:.1f} %",
        "mask flips in 10 steps": " -> ".join("-" if flip is None else f"{100 * flip:.2f} %" for flip in flips),
        "perplexity, unigram model": f"{figures['perplexity_unigram']:.1f}",
        "perplexity, trained": f"{figures['perplexity_latent']:.3f}",
        "perplexity, packed": f"{figures['perplexity_packed']:.3f}",
        "tokens/s training": f"{figures['train_tokens_per_second']:,.0f}",
        "tokens/s writing": f"{figures['generate_tokens_per_second']:,.0f}",
    }
    width = max(len(name) for name in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
