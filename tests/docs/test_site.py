"""The site itself: it builds strictly, asks no other host for anything, and leaves nothing of the program out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import figures
import layouts
import sparse_bitnet
import tables
from fenced import ROOT
from sparse_bitnet.formats import fragments
from sparse_bitnet.kernels import OPERATORS
from sparse_bitnet.training.config import TrainConfig

DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "notebooks" / "one-weight.ipynb"
LOADED = re.compile(
    r'<(?:script|img|iframe|source)[^>]*\ssrc="([^"]+)"|<link[^>]*rel="(?:stylesheet|icon)"[^>]*href="([^"]+)"'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory


def text_of(page: Path) -> str:
    return unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_the_site_builds_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(list(DOCS.rglob("*.md")))
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert [found for pair in LOADED.findall(html) for found in pair if "://" in found] == [], page
        assert "<!-- generated" not in html, page


def test_the_reference_has_every_command_setting_format_kernel_and_public_name(site: Path) -> None:
    commands = text_of(site / "reference" / "commands.html")
    assert "eval ppl" in tables.commands() and "bench decode" in tables.commands()
    for name, command in tables.commands().items():
        assert f"{tables.PROGRAM} {name}" in commands
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        assert [option for option in options if option not in commands and option != "--help"] == []
    settings = text_of(site / "reference" / "settings.html")
    for section, field in TrainConfig.model_fields.items():
        fields = getattr(field.annotation, "model_fields", None)
        assert all(f"{section}.{name}" in settings for name in fields) if fields else section in settings
    kernels = text_of(site / "explanation" / "kernels.html")
    assert all(backend.name in kernels for operator in OPERATORS for backend in operator.backends)
    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    missing = [name for name in sparse_bitnet.__all__ if not re.search(rf'id="sparse_bitnet\.[\w.]*\b{name}"', python)]
    assert missing == []


def test_every_figure_and_table_is_shown() -> None:
    told = "".join(file.read_text(encoding="utf-8") for file in DOCS.rglob("*.md"))
    assert [name for name in figures.FIGURES | tables.TABLES if f"<!-- generated: {name} -->" not in told] == []


def test_the_picture_of_the_fragments_has_each_thread_of_the_warp_with_its_16_codes() -> None:
    places = [layouts.value_place(row, window) for row in range(16) for window in range(fragments.WINDOWS)]
    for thread in range(32):
        bits = [bit for owner, held in places if owner == thread for bit in held]
        assert sorted(bits) == list(range(32))
    first = {window: layouts.metadata_place(0, window) for window in range(8)}
    assert first == {window: (0, 4 * window) for window in range(8)}


def test_owners_of_bits_are_those_of_the_layout() -> None:
    """By the drawing in formats/i2.py: code i of a byte has the bits 2 i and 2 i + 1."""
    from sparse_bitnet.formats import i2

    assert layouts.owners(i2.pack, [1, 0, -1, 1], [[0], [1], [2], [3]]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_notebook_runs_and_says_what_it_says_on_the_page() -> None:
    """Each output of text is the one that is stored, but of cells tagged `varies`: sums of floats differ by machine."""
    stored = nbformat.read(NOTEBOOK, as_version=4)
    fresh = NotebookClient(nbformat.from_dict(stored), timeout=120, kernel_name="python3").execute(cwd=str(ROOT))
    assert (
        sum(1 for cell in stored.cells for out in cell.get("outputs", ()) if "image/svg+xml" in out.get("data", {}))
        >= 4
    )
    for before, after in zip(stored.cells, fresh.cells, strict=True):
        if "varies" not in before.metadata.get("tags", ()):
            assert _text(before) == _text(after)


def _text(cell: nbformat.NotebookNode) -> str:
    """What a cell printed: a kernel may deliver it in several pieces, by the clock."""
    return "".join(output["text"] for output in cell.get("outputs", ()) if output.output_type == "stream")
