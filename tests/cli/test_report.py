"""`sparse-bitnet report`: a page, pictures, figures; or one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Command = Callable[..., object]


def test_it_writes_page_pictures_and_figures(command: Command, trained_runs: list[Path], tmp_path: Path) -> None:
    page, pictures, figures = tmp_path / "report.html", tmp_path / "png" / "charts", tmp_path / "figures.json"
    answer = command("report", trained_runs[1], "--output", page, "--png", pictures, "--json", figures)
    assert answer.code == 0, answer
    assert "9 charts of 1 run\n" in answer.out
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert len(list(pictures.glob("*.png"))) == 9
    assert json.loads(figures.read_text())["comparison"][0]["quantity"] == "method"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "png", "report.html"]


def test_a_mistake_is_one_line_and_an_older_page_stands(
    command: Command, trained_runs: list[Path], tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    page.write_text("older")
    for wrong, message in (
        ([tmp_path / "nowhere"], "nowhere is not a directory"),
        ([trained_runs[0] / "model"], "holds no metrics.jsonl"),
        ([trained_runs[0], trained_runs[0]], "is given twice"),
    ):
        answer = command("report", *wrong, "--output", page)
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert message in answer.err
    assert page.read_text() == "older"
    answer = command("report", trained_runs[0], "--output", tmp_path / "missing" / "report.html")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "could not be written" in answer.err
