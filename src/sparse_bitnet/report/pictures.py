"""Charts as SVG that goes into a page and as PNG files."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import matplotlib

from sparse_bitnet.checkpoint.directory import whole_file
from sparse_bitnet.report.charts import Chart
from sparse_bitnet.report.themes import LIGHT, VARIABLE, with_variables

DOTS_PER_INCH = 200
SETTINGS: dict[Any, Any] = {  # SVG keeps text as text: it can be read out, searched, and is set in the font of the page
    "font.size": 9.5, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def inline_svg(chart: Chart) -> str:
    """The `<svg>` element: as wide as its column, colours by the page's CSS variables, ids that no other chart has."""
    written = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        chart.draw(VARIABLE).savefig(written, format="svg", metadata={"Date": None})
    svg = written.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font-family: [^;\"]+", "font-family: inherit", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{chart.name}-", svg)
    return with_variables(svg)


def write_png(chart: Chart, directory: Path) -> Path:
    """The chart as `name.png` in `directory`, light, with its title and legend; OSError names the file."""
    file = directory / f"{chart.name}.png"
    with matplotlib.rc_context(SETTINGS), whole_file(file) as staging:
        figure = chart.draw(LIGHT)
        figure.suptitle(chart.title, fontsize=10, color=LIGHT.ink, parse_math=False)
        if chart.legend:
            figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8, labelcolor=LIGHT.muted)
        figure.savefig(staging, format="png", dpi=DOTS_PER_INCH)
    return file
