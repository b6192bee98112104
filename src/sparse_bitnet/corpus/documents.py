"""Documents out of files, directories and Hub data sets."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from glob import escape
from lzma import LZMAError
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from pyarrow import ArrowException
from zstandard import ZstdError

COMPRESSIONS = (".xz", ".gz", ".zst")
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text", ".py": "text"}
DAMAGE = (OSError, EOFError, LZMAError, zlib.error, ZstdError, ArrowException, DatasetsError)


@dataclass(frozen=True)
class TextSource:
    """Where text comes from: files and directories, or a data set of the Hub.

    files        text (a file is a document), jsonl or parquet (a row is a document), each also as .xz, .gz or .zst;
                 directories are searched for files with those endings
    dataset      `name` or `name:configuration` on the Hub, instead of files
    split        split of the Hub data set
    text_field   column of jsonl, parquet and Hub data sets that holds the text
    """

    files: tuple[str, ...] = ()
    dataset: str | None = None
    split: str = "train"
    text_field: str = "text"

    def __post_init__(self) -> None:
        if bool(self.files) == bool(self.dataset):
            raise ValueError("give either files or a dataset to read text from (data.files, data.dataset)")

    def documents(self) -> Iterator[str]:
        """The documents, in a fixed order, read as asked for. ValueError names the file that cannot be read."""
        if self.dataset:
            name, _, configuration = self.dataset.partition(":")
            yield from _texts(self.dataset, self.text_field, name, name=configuration or None, split=self.split)
        for path in self.paths():
            reader = READERS.get(_ending(path), "text")
            if "::" in str(path):
                raise ValueError(f"{path} has '::' in its name, which `datasets` cannot read: rename it")
            file = escape(str(path))  # names are no patterns
            if reader == "text":
                yield from _texts(str(path), "text", reader, data_files=[file], sample_by="document")
            else:
                yield from _texts(str(path), self.text_field, reader, data_files=[file])

    def paths(self) -> list[Path]:
        """The files behind `files`, directories searched; ValueError where one is missing or has nothing to read."""
        found = [path for entry in self.files for path in _files_of(Path(entry).expanduser())]
        return list(dict.fromkeys(found))


def _texts(origin: str, field: str, builder: str, **options: Any) -> Iterator[str]:
    """The texts of one file or data set, read through `datasets`; what goes wrong is told with `origin`."""
    try:
        for row in datasets.load_dataset(builder, **{"split": "train", "streaming": True, **options}):
            if field not in row:
                raise ValueError(f"{origin} has no field {field!r}, it has {', '.join(row)}: set data.text_field")
            if not isinstance(row[field], str | None):
                kind = type(row[field]).__name__
                raise ValueError(f"{origin}: the field {field!r} holds a {kind}, and not text: set data.text_field")
            if row[field]:
                yield row[field]
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except DAMAGE as error:
        raise ValueError(
            f"{origin} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error


def _files_of(entry: Path) -> list[Path]:
    if entry.is_file():
        return [entry]
    if not entry.is_dir():
        raise ValueError(f"{entry}: no such file or directory")
    found = sorted(path for path in entry.rglob("*") if path.is_file() and _ending(path) in READERS)
    if not found:
        raise ValueError(
            f"{entry} holds no file ending in {', '.join(READERS)} (or those with {', '.join(COMPRESSIONS)})"
        )
    return found


def _ending(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSIONS else path.suffix.lower()
