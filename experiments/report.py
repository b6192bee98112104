"""REPORT.md and its figures, from the result files and nothing else.

    python -m experiments.report

Every number in the report stands in a result file, or is computed from some here. What is not run yet is said to be so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments import (
    section_ablations,
    section_claim,
    section_frontier,
    section_limits,
    section_setup,
    section_sizes,
    section_verdict,
)
from experiments.results import Results
from experiments.settings import PAPER, TOY, Scale
from experiments.wording import NOT_YET
from sparse_bitnet.checkpoint.directory import write_text

HERE = Path("experiments")


def report_text(scale: Scale, results: Results, figures: dict[str, str]) -> str:
    """The report; `figures` holds the file of each figure that could be drawn."""
    parts = [
        section_setup.heading(scale, results),
        section_verdict.in_short(scale, results),
        section_setup.method(scale, results),
        section_setup.learning_rates(scale, results),
        section_claim.table_a(scale, results),
        section_sizes.at_one_ratio(scale, results),
        section_sizes.over_sizes(scale, results),
        section_sizes.repeated_text(scale, results),
        section_sizes.zero_shot(scale, results),
        section_ablations.table_b(scale, results),
        section_frontier.table_c(scale, results),
        _figures(figures),
        section_limits.limits(scale, results),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _figures(drawn: dict[str, str]) -> str:
    if not drawn:
        return f"## Figures\n\n{NOT_YET[0].upper()}{NOT_YET[1:]}."
    return "## Figures\n\n" + "\n\n".join(f"![{title}](figures/{file})\n\n{title}" for title, file in drawn.items())


def write_report(
    results: Annotated[Path, typer.Option(help="Result files.")] = HERE / "results" / "runs",
    out: Annotated[Path, typer.Option(help="Where REPORT.md and figures/ go.")] = HERE,
    toy: Annotated[bool, typer.Option("--toy", help="Of the runs that --toy made.")] = False,
) -> None:
    """Write the report and draw its figures."""
    from experiments.figures import draw_figures  # matplotlib, which the text does not need

    scale, found = TOY if toy else PAPER, Results(results)
    drawn = draw_figures(scale, found, out / "figures")
    write_text(out / "REPORT.md", report_text(scale, found, drawn))
    print(f"{out / 'REPORT.md'}: {len(found.found)} results, {len(drawn)} figures")


if __name__ == "__main__":
    typer.run(write_report)
