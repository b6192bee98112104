"""The page and the pictures: complete in themselves, and true to whatever runs are called."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from sparse_bitnet.report.charts import curve_charts
from sparse_bitnet.report.page import Report, figures, make_report, render
from sparse_bitnet.report.pictures import write_png
from sparse_bitnet.report.runs import read_runs
from sparse_bitnet.report.themes import DARK, LIGHT


@pytest.fixture(scope="module")
def report(trained_runs: list[Path]) -> Report:
    return make_report(read_runs(trained_runs))


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return render(report)


class Tags(HTMLParser):
    """All tags with their attributes, and the texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_it_needs_nothing_from_anywhere(page: str) -> None:
    tags = Tags(page).tags
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in tags}
    pointers = [
        value
        for _, attributes in tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href") and value
    ]
    assert pointers
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in pointers)
    assert re.findall(r"url\((?!#)|@import", page) == []


def test_ids_are_unique_and_what_is_pointed_at_is_there(page: str) -> None:
    tags = Tags(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pointed = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page))
    assert {one or other for one, other in pointed} <= set(ids)


def test_every_chart_has_a_heading_a_description_and_a_size(report: Report, page: str) -> None:
    tags = Tags(page).tags
    assert [chart.name for chart in report.charts] == [
        "loss", "learning-rate", "flip-rate", "zeros", "polarisation", "zeros-by-layer-0", "zeros-by-layer-1",
        "weights-0", "weights-over-time-0", "weights-by-kind-0",
        "weights-1", "weights-over-time-1", "weights-by-kind-1",
    ]  # fmt: skip
    described = [attributes for _, attributes in tags if attributes.get("role") == "img"]
    assert [attributes["aria-label"] for attributes in described] == [f"{c.title}. {c.caption}" for c in report.charts]
    assert sum(tag == "svg" and "viewbox" in attributes for tag, attributes in tags) == len(report.charts) + 2
    assert sum(tag == "caption" for tag, _ in tags) == sum(tag == "table" for tag, _ in tags) == 3


def test_no_colour_of_a_chart_is_fixed(page: str) -> None:
    """All come from the variables of the page, which has a light and a dark value for each."""
    svg = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert re.findall(r"(?:fill|stroke|color): ?#\w+", svg) == []
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    for theme in (LIGHT, DARK):
        assert used <= {name for name, _ in re.findall(r"(--[\w-]+): (#\w{6});", theme.variables())}


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        shares = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_lines_stand_out(theme) -> None:
    assert all(contrast(theme.muted, ground) >= 4.5 for ground in (theme.page, theme.card))
    assert all(contrast(theme.ink, ground) >= 7 for ground in (theme.page, theme.card))
    assert all(contrast(colour, ground) >= 3 for colour in theme.runs for ground in (theme.page, theme.card))


def test_a_name_is_text_whatever_is_in_it(report: Report) -> None:
    name = '<script>alert("&")</script> $x_1$'
    parsed = Tags(render(make_report([replace(report.runs[0], name=name, moments=[])])))
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert name in parsed.texts


def test_one_run_alone_and_one_without_histograms(report: Report) -> None:
    old = replace(report.runs[0], moments=[], remarks=["no histograms.jsonl"])
    alone = make_report([old])
    assert [chart.name for chart in alone.charts][-1] == "zeros-by-layer-0"
    page = render(alone)
    assert "1 run of Sparse-BitNet" in page
    assert "no histograms.jsonl" in page
    assert "<h2>Latent weights" not in page
    assert "Settings that differ" not in page
    both = make_report([old, report.runs[1]])
    assert [chart.name for chart in both.charts][-3:] == ["weights-1", "weights-over-time-1", "weights-by-kind-1"]


def test_runs_of_different_batches_are_drawn_over_tokens(report: Report) -> None:
    larger = replace(report.runs[1], environment={"tokens_per_step": 64})
    for runs, label, last in (([report.runs[0], larger], "tokens", 384), (report.runs, "optimizer steps", 6)):
        axes = curve_charts(runs)[0].draw(LIGHT).axes[0]
        assert axes.get_xlabel() == label
        assert axes.dataLim.x1 == last


def test_more_runs_than_colours_differ_in_their_dashes(report: Report) -> None:
    many = [replace(report.runs[0], name=f"run {index}", moments=[], events=[]) for index in range(9)]
    page = render(make_report([*many, replace(report.runs[1], moments=[])]))
    legend = re.findall(r'style="stroke: (.*?)" stroke-width="3" stroke-dasharray="(.*?)"', page)
    assert len(set(legend)) == len(legend) == 10


def test_pictures_are_written_whole(report: Report, tmp_path: Path) -> None:
    files = [write_png(chart, tmp_path) for chart in (report.charts[0], report.charts[5], report.charts[9])]
    for file in files:
        with Image.open(file) as image:
            assert image.size[0] == 1000
            assert len(image.convert("RGB").getcolors(2**24)) > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.name for file in files)
    with pytest.raises(OSError, match="could not be written"):
        write_png(report.charts[0], tmp_path / "missing")


def test_the_figures_are_those_of_the_runs(report: Report) -> None:
    found = figures(report)
    assert [run["name"] for run in found["runs"]] == ["sparse", "dense-first"]
    assert found["runs"][0]["validation loss, last"] == report.runs[0].validations[-1].eval_loss
    assert len(found["runs"][0]["events"]) == 6
    assert sum(found["runs"][1]["histogram"]["masked"]) == pytest.approx(50)
