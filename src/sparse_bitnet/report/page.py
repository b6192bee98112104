"""The page: charts and tables of some runs in one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import sparse_bitnet
from sparse_bitnet.report import series, tables
from sparse_bitnet.report.charts import Chart, curve_charts, histogram_charts, layer_chart, map_limits
from sparse_bitnet.report.pictures import inline_svg
from sparse_bitnet.report.runs import Run
from sparse_bitnet.report.themes import DARK, LIGHT, VARIABLE, run_colour, run_dashes, with_variables


@dataclass(frozen=True)
class Report:
    """Some runs and their charts: curves of all, maps of the layers, and histograms, a list a run."""

    runs: Sequence[Run]
    curves: list[Chart]
    layers: list[Chart]
    histograms: list[list[Chart]]

    @property
    def charts(self) -> list[Chart]:
        return [*self.curves, *self.layers, *(chart for charts in self.histograms for chart in charts)]


def make_report(runs: Sequence[Run]) -> Report:
    limits = map_limits(runs)
    layers = [layer_chart(run, index, limits) for index, run in enumerate(runs)]
    return Report(
        runs=runs,
        curves=curve_charts(runs),
        layers=[chart for chart in layers if chart is not None],
        histograms=[charts for index, run in enumerate(runs) if (charts := histogram_charts(run, index))],
    )


def render(report: Report) -> str:
    """The HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    room = files("sparse_bitnet.report")
    template = environment.from_string(room.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        version=sparse_bitnet.__version__,
        style=Markup(room.joinpath("page.css").read_text(encoding="utf-8")),
        light=Markup(LIGHT.variables()),
        dark=Markup(DARK.variables()),
        svg=lambda chart: Markup(inline_svg(chart)),
        legend=[legend_entry(run, index) for index, run in enumerate(report.runs)],
        comparison=tables.comparison(report.runs),
        settings=tables.different_settings(report.runs),
        surroundings=tables.surroundings(report.runs),
    )


def legend_entry(run: Run, index: int) -> tuple[str, str, str]:
    """Name, colour and dashes (of an SVG line 2 wide) of a run."""
    dashes = " ".join(f"{2 * length:g}" for length in run_dashes(index))
    return run.name, with_variables(run_colour(VARIABLE, index)), dashes or "none"


def figures(report: Report) -> dict[str, Any]:
    """What the page shows, as numbers."""
    return {
        "comparison": [
            {"quantity": row.label, **dict(zip((run.name for run in report.runs), row.cells, strict=True))}
            for row in tables.comparison(report.runs)
        ],
        "runs": [_run_figures(run) for run in report.runs],
    }


def _run_figures(run: Run) -> dict[str, Any]:
    last = run.moments[-1] if run.moments else None
    return {
        "name": run.name,
        "directory": str(run.directory),
        "remarks": run.remarks,
        "config": run.config,
        **{quantity.label: quantity.of(run) for quantity in tables.QUANTITIES},
        "events": [event.model_dump(exclude={"layers"}, exclude_none=True) for event in run.events],
        "validations": [event.model_dump(exclude_none=True) for event in run.validations],
        "zeros_by_layer": {name: layer.zeros for name, layer in run.events[-1].layers.items()} if run.events else {},
        "histogram": {
            "edges": series.bin_edges().tolist(),
            "kept": series.densities(last)[0].tolist(),
            "masked": series.densities(last)[1].tolist(),
        } if last else None,
    }  # fmt: skip
