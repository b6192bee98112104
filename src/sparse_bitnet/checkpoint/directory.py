"""Check a model directory before it is read, and write one so that it is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def is_no_hub_id(source: str) -> bool:
    """Whether `source` can be meant as a path alone: an id of the Hub is a name, or owner/name."""
    return source.count("/") > 1 or source.startswith((".", "/", "~"))


def check_directory(directory: Path | str) -> None:
    """ValueError unless `directory` holds a model as `save_pretrained` writes it, all files whole."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory: give a model directory as `save_pretrained` writes it")
    config = read_json(directory / CONFIG)
    if "model_type" not in config:
        raise ValueError(f"{directory / CONFIG} names no model_type: not the config of a transformers model")
    for file in weight_files(directory):
        stored_tensor_names([file])


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory; none where they are older `.bin` files. ValueError: no weights."""
    if (directory / INDEX).exists():
        shards = sorted(set(read_json(directory / INDEX).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (directory / shard).exists()]
        if missing or not shards:
            raise ValueError(
                f"{directory / INDEX} names {(missing or ['no file'])[0]}, which is missing: copy it again"
            )
        return [directory / shard for shard in shards]
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if any((directory / name).exists() for name in OTHER_WEIGHTS):
        return []
    raise ValueError(f"{directory} holds no {WEIGHTS}: the checkpoint is incomplete, save or copy it again")


def stored_tensor_names(files: list[Any]) -> set[str]:
    """Names of the tensors in these safetensors files; ValueError for one that is truncated or of another kind."""
    names: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names.update(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read ({error}): truncated or not safetensors, copy it again") from error
    return names


def copy_model(source: Path, target: Path) -> None:
    """Copy config, weights and tokenizer of one model directory to another, and nothing else that lies there."""
    files = [source / CONFIG, source / GENERATION_CONFIG, source / INDEX, *weight_files(source)]
    for file in files:
        if file.exists():
            shutil.copy2(file, target / file.name)
    copy_tokenizer(source, target)


def copy_tokenizer(source: Path | str, target: Path) -> None:
    """Copy the tokenizer files of one model directory, if it has any, to another."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).exists():
            shutil.copy2(Path(source) / name, target / name)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; ValueError where it is missing or damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: not a model directory, or an incomplete one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): the file is damaged, save or copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object: the file is damaged, save or copy it again")
    return content


@contextmanager
def whole_directory(target: Path | str, replace: bool = False) -> Iterator[Path]:
    """Yields an empty directory beside `target` that becomes `target` when the block ends, and vanishes if it fails.

    ValueError where `target` exists and is not empty, unless it is to be replaced. OSError names `target` and what went
    wrong, a full disk included.
    """
    target = Path(target)
    if not replace and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already: choose another name or remove it first")
    staging = target.with_name(f".{target.name}.incomplete")
    remove_directory(staging)
    try:
        staging.mkdir(parents=True)
        yield staging
        publish_directory(staging, target)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{target} could not be written ({error}): nothing of it is left behind") from error
    finally:
        remove_directory(staging)


def publish_directory(staging: Path, target: Path) -> None:
    """Flush the files of `staging` to disk, then give it its name in one step, in place of what had it."""
    for file in [*staging.rglob("*"), staging]:
        _flush(file)
    remove_directory(target)
    staging.rename(target)
    _flush(target.parent)


def remove_directory(directory: Path) -> None:
    """Remove a directory, if it is there."""
    shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yields a hidden name beside the file `target`, which the file gets when the block ends well; OSError names it."""
    staging = target.with_name(f".{target.name}.incomplete")
    try:
        yield staging
        _flush(staging)
        staging.replace(target)
    except OSError as error:
        raise OSError(f"{target} could not be written ({error})") from error
    finally:
        staging.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a small file whole or not at all; OSError names it."""
    with whole_file(file) as staging:
        staging.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
