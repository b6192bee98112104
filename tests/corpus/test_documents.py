"""Documents out of every kind of file, and one sentence for every kind of damage."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from sparse_bitnet.corpus.documents import TextSource

TEXTS = ["first document\n\nwith two paragraphs", "second, with an umlaut: ü"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def read(*files: Path, **options: str) -> list[str]:
    return list(TextSource(tuple(str(file) for file in files), **options).documents())


def jsonl(field: str = "text") -> bytes:
    return "".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"corpus.jsonl{suffix}"
    file.write_bytes(COMPRESS[suffix](jsonl()))
    assert read(file) == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"book.txt{suffix}"
    file.write_bytes(COMPRESS[suffix](TEXTS[0].encode()))
    assert read(file) == [TEXTS[0]]


def test_parquet_with_another_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "corpus.parquet")
    assert read(tmp_path / "corpus.parquet", text_field="body") == TEXTS


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    named, others = tmp_path / "a[1]?*.txt", ("a1bc.txt", "a1b.txt")
    for file, text in ((named, "itself"), *((tmp_path / other, "another") for other in others)):
        file.write_text(text)
    assert read(named) == ["itself"]
    (tmp_path / "a::b.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a::b.txt has '::' in its name"):
        read(tmp_path / "a::b.txt")


def test_a_field_that_holds_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ["a", "b"]}\n')
    with pytest.raises(ValueError, match=r"a.jsonl: the field 'text' holds a list, and not text: set data.text_field"):
        read(tmp_path / "a.jsonl")


def test_a_directory_is_searched_in_a_fixed_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("third")
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert read(tmp_path) == [*TEXTS, "third"]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n{"text": "some"}\n')
    assert read(tmp_path / "a.jsonl") == ["some"]


def test_files_or_a_dataset_but_not_both() -> None:
    with pytest.raises(ValueError, match="either files or a dataset"):
        TextSource()
    with pytest.raises(ValueError, match="either files or a dataset"):
        TextSource(("a.txt",), dataset="name")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing.txt: no such file or directory"):
        read(tmp_path / "nothing.txt")


def test_a_directory_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"holds no file ending in"):
        read(tmp_path)


def test_an_unknown_field_is_named_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("body"))
    with pytest.raises(ValueError, match=r"a.jsonl has no field 'text', it has body, id: set data.text_field"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"\xff\xfe\xfa text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": '),
        ("a.jsonl.gz", gzip.compress(jsonl() * 100, mtime=0)[:60]),
        ("a.jsonl.xz", lzma.compress(jsonl() * 100)[:60]),
        ("a.txt.xz", b"not compressed"),
        ("a.txt.zst", b"not compressed"),
        ("a.parquet", b"PAR1 but no table"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} (is not UTF-8|cannot be read)"):
        read(tmp_path / name)
