"""`sparse-bitnet report RUN [RUN ...]`"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from sparse_bitnet.cli.options import JsonFile, write_json


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories that `train` wrote (output_dir).")],
    output: Annotated[Path, typer.Option(help="HTML file to write; replaced if it exists.")] = Path("report.html"),
    png: Annotated[
        Path | None, typer.Option(metavar="DIRECTORY", help="Also write each chart there as a PNG file.")
    ] = None,
    json: JsonFile = None,
) -> None:
    """One HTML page on what runs did, side by side; it needs no network and no other file."""
    if find_spec("matplotlib") is None:
        raise ValueError("report needs the package matplotlib: pip install 'sparse-bitnet[report]'")
    from sparse_bitnet.checkpoint.directory import write_text
    from sparse_bitnet.report.page import figures, make_report, render
    from sparse_bitnet.report.pictures import write_png
    from sparse_bitnet.report.runs import read_runs

    found = read_runs(runs)
    for run in found:
        for remark in run.remarks:
            print(f"{run.name}: {remark}")
    made = make_report(found)
    write_text(output, render(made))
    count = f"{len(found)} run{'s' if len(found) > 1 else ''}"
    print(f"{output}: {output.stat().st_size / 1e3:,.0f} kB, {len(made.charts)} charts of {count}")
    if png is not None:
        png.mkdir(parents=True, exist_ok=True)
        for chart in made.charts:
            write_png(chart, png)
        print(f"{png}: {len(made.charts)} PNG files")
    write_json(json, figures(made))
