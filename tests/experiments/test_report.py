"""The report: what is committed is what the generator makes, and its numbers are those of the results."""

from __future__ import annotations

from dataclasses import replace
from math import exp
from pathlib import Path
from statistics import fmean

import pytest

from experiments import frontier
from experiments.degradation import degradations, finished_runs
from experiments.figures import draw_figures
from experiments.report import report_text
from experiments.results import Results
from experiments.settings import PAPER, TOY, Scale, full_precision, ternary
from experiments.tables import LARGER, PATTERNS, chosen_rate

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_the_committed_report_is_what_the_committed_results_make(tmp_path: Path) -> None:
    results = Results(EXPERIMENTS / "results" / "runs")
    figures = draw_figures(PAPER, results, tmp_path)
    assert (EXPERIMENTS / "REPORT.md").read_text(encoding="utf-8") == report_text(PAPER, results, figures)
    assert {file.name for file in (EXPERIMENTS / "figures").glob("*")} == set(figures.values())
    assert not any(str(result["commit"]).endswith("-dirty") for result in results.found.values())


def test_without_results_it_says_so(tmp_path: Path) -> None:
    for scale in (PAPER, TOY):
        text = report_text(scale, Results(tmp_path), {})
        assert "No runs yet." in text and "Table A is not run yet." in text
        assert "nan" not in text and "None" not in text


def test_ratios_are_over_the_dense_model_of_the_same_seed(micro: Scale, trained: Results) -> None:
    text = report_text(micro, trained, {})
    in_trend = {"tokens": micro.trend_tokens, "batch": micro.trend_batch, "zero_shot": False}
    for scale, patterns, change in ((micro, PATTERNS, {}), (micro.of_trend("toy"), LARGER, in_trend)):
        for row in degradations(scale, trained, "toy", patterns):
            for values, make in (("full", full_precision), ("ternary", ternary)):
                rate = chosen_rate(scale, trained, values)
                assert rate is not None
                runs = [[make(micro, "toy", one, seed, rate) for one in (row.pattern, "8:8")] for seed in micro.seeds]
                asked = [[replace(run, **change) for run in pair] for pair in runs]
                found = [[trained.found[run.key]["perplexity"]["test"] for run in pair] for pair in asked]
                each = [sparse / base for sparse, base in found]
                assert row.ratios[values] == pytest.approx(each)
                assert f"{fmean(each):.3f} ± " in text
    runs = finished_runs(micro, trained, "toy", "full", "6:8")
    assert list(runs) == list(micro.seeds)
    known = fmean(exp(fmean(loss for _, loss in run["loss"][-3:])) for run in runs.values())
    assert f"| BF16 | 6:8 | {known:.2f} ± " in text
    assert f"{len(trained.found)} runs on" in text
    assert "Table A is not run yet" not in text


def test_figures_are_drawn_where_there_are_results(micro: Scale, trained: Results, tmp_path: Path) -> None:
    drawn = draw_figures(micro, trained, tmp_path)
    assert {"degradation.svg", "flips.svg", "histograms.svg", "zeros.svg", "frontier.svg", "trend.svg"} <= set(
        drawn.values()
    )
    for file in drawn.values():
        assert (tmp_path / file).read_text(encoding="utf-8").rstrip().endswith("</svg>")
    first = {file: (tmp_path / file).read_bytes() for file in drawn.values()}
    draw_figures(micro, trained, tmp_path)
    assert first == {file: (tmp_path / file).read_bytes() for file in drawn.values()}


def test_the_frontier_keeps_what_nothing_cheaper_beats() -> None:
    def point(bits: float, perplexity: float) -> frontier.Point:
        return frontier.Point(f"{bits}", "sign", "3:4", False, "t5", bits, bits, (perplexity,))

    points = [point(1.25, 60), point(1.5, 61), point(1.6, 55), point(2.0, 54), point(2.0, 58)]
    best = frontier.efficient(points, frontier.stored_bits)
    assert [(one.stored_bits, one.perplexities[0]) for one in best] == [(1.25, 60), (1.6, 55), (2.0, 54)]
