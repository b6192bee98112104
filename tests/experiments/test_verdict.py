"""Verdicts follow from the results: on results made to hold the paper's claims, to hold their contrary, and neither."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import paper
from experiments.degradation import ablations, degradations
from experiments.report import report_text
from experiments.results import Results
from experiments.section_limits import limits
from experiments.section_verdict import in_short
from experiments.settings import PAPER, Run
from experiments.statistics import LEVEL
from experiments.tables import ABLATED, PATTERNS, TABLES, changes, chosen_rate, missing

SCATTER = {100: 1.0, 0: 1.0, 1: 1.002, 2: 0.998}  # by seed, beside that of the dense model
Cost = Callable[[Run], float]


def cost_of_paper(run: Run) -> float:
    """What the pattern costs there, and what the change of the method does."""
    costs = paper.DEGRADATIONS.get(str(run.recipe.pattern))
    if costs is None:
        return 1.0
    change = paper.ABLATIONS["mask from the quantised weights"] if run.recipe.mask_from == "quantized" else 1.0
    return costs[run.recipe.values == "ternary"] * change


def results_of(directory: Path, cost: Cost, zeros: float = paper.ZEROS, spread: float = 1.0) -> Results:
    """Results of every run that a table asks for, with a perplexity of 50 times what its settings cost."""
    results = Results(directory)
    while runs := missing(PAPER, results, list(TABLES)):
        for run in runs:
            scatter = 1.0 if run.recipe.pattern.is_dense else SCATTER[run.seed] ** spread
            test = 50 * cost(run) * scatter
            found: dict[str, Any] = {
                "diverged_at": None if math.isfinite(test) else 7,
                "perplexity": {"valid": 50 + abs(run.learning_rate - 4e-3), "test": test},
                "readings": [{"step": 1, "flip_rate": None, "zeros": zeros}],
                "loss": [[1, 4.0]],
                "zero_shot": {"blimp": {"sum": 0.7 / cost(run)}, "hellaswag": {"by_character": 0.25}},
                "gpus": ["a GPU"],
                "commit": "0",
                "corpus": {"tokens": {"train": 1_000_000}},
            }
            results.found[run.key] = found
    return results


def told(results: Results) -> dict[str, list[str]]:
    """The first cell of each row of what reproduces -> the others."""
    lines = in_short(PAPER, results).split("## What reproduces")[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_results_as_the_papers_reproduce_it(tmp_path: Path) -> None:
    results = results_of(tmp_path, cost_of_paper)
    rows = told(results)
    assert rows["sparsity costs ternary less"][1:] == ["smaller for ternary at 7:8, 6:8, 5:8, 4:8, 3:8, 2:8", "yes"]
    for size, tokens in (("4.8m", "100"), ("1.8m", "67"), ("4.8m", "25"), ("21m", "5.6")):
        row = rows[f"so it does at {size} weights, {tokens} tokens each, 6:8"]
        assert row[1:] == ["BF16 1.050 ± 0.002, ternary 1.010 ± 0.002", "smaller for ternary"]
        found = f"* {size} weights, {tokens} tokens each: smaller for ternary at 6:8, 4:8\n"
        assert found in in_short(PAPER, results)
    assert rows["zeros among trained ternary weights"] == ["0.42", "0.420 ± 0.000", "compatible"]
    assert rows["6:8 costs ternary less accuracy, zero-shot"][2] == "too few seeds"
    assert rows["mask from the quantised weights is worse"][2] == "yes"
    assert rows["masked gradient is worse"][2] == "no difference can be told"
    assert all(cell.endswith(": compatible") for pattern in PATTERNS[1:] for cell in rows[pattern])
    assert "less than in the paper" not in in_short(PAPER, results)
    assert "* More seeds: no pattern asks for them." in limits(PAPER, results)


def test_contrary_results_contradict_it(tmp_path: Path) -> None:
    def turned(run: Run) -> float:
        better = 0.9 if run.recipe.order == "mask-then-quant" else 1.0
        return 1.0 if run.recipe.pattern.is_dense else 1.02 if run.recipe.values == "full" else 1.06 * better

    results = results_of(tmp_path, turned, zeros=0.5)
    rows = told(results)
    assert rows["sparsity costs ternary less"][1:] == [
        "smaller for ternary at no pattern and larger at 7:8, 6:8, 5:8, 4:8, 3:8, 2:8",
        "larger for ternary at 6 of 6",
    ]
    assert [cell.rpartition(": ")[2] for cell in rows["6:8"]] == ["below", "above", "below"]
    assert rows["zeros among trained ternary weights"][2] == "above"
    assert rows["mask-then-quant is worse"][2] == "better"
    assert "less than in the paper at 7:8, 6:8, 5:8, 4:8, 3:8, 2:8." in in_short(PAPER, results)


def test_one_pattern_of_two_is_not_all(tmp_path: Path) -> None:
    def at_one(run: Run) -> float:
        return 1.1 if run.recipe.gradient == "masked" and str(run.recipe.pattern) == "6:8" else cost_of_paper(run)

    assert told(results_of(tmp_path, at_one))["masked gradient is worse"][2] == "worse at 1 of 2 patterns"


def test_holm_stands_between_a_low_p_and_a_verdict(tmp_path: Path) -> None:
    """Each of the six patterns, and of the changes, would be told if it were asked alone."""

    def slightly(run: Run) -> float:
        is_changed = run.recipe.mask_from == "quantized"
        return 1.0 if run.recipe.pattern.is_dense else 1.0327 if run.recipe.values == "full" or is_changed else 1.026

    results = results_of(tmp_path, slightly, spread=1.5)
    rows = degradations(PAPER, results, "1.8m", PATTERNS)
    assert all(row.comparison is not None and row.comparison.p < LEVEL for row in rows)
    assert {row.verdict for row in rows} == {"no difference can be told"}
    changed = next(one for one in ablations(PAPER, results, "6:8") if one.name == "mask from the quantised weights")
    assert changed.comparison is not None and changed.comparison.p < LEVEL
    assert changed.verdict == "no difference can be told"
    assert told(results)["sparsity costs ternary less"][2] == "yes at 0 of 6, else cannot be told"
    assert "of each precision, with the deviations seen: 4 at 7:8, 2 at 6:8" in " ".join(limits(PAPER, results).split())


@pytest.mark.parametrize("pattern", ["2:8", "8:8"])
def test_a_run_that_diverged_is_told(tmp_path: Path, pattern: str) -> None:
    def lost(run: Run) -> float:
        is_lost = run.seed == 1 and run.recipe.values == "full" and str(run.recipe.pattern) == pattern
        return math.inf if is_lost else cost_of_paper(run)

    results = results_of(tmp_path, lost)
    report = report_text(PAPER, results, {})
    lost_rows = ["2:8"] if pattern == "2:8" else PATTERNS[1:]
    rows = {row.pattern: row.verdict for row in degradations(PAPER, results, "1.8m", PATTERNS)}
    assert [one for one, verdict in rows.items() if verdict == "a run diverged"] == list(lost_rows)
    assert f"a run diverged, at {len(lost_rows)} of 6" in report and "diverged, 1 of 3" in report
    assert "of 6 patterns at 1.8m" in report and "nan" not in report and "inf " not in report


@pytest.mark.parametrize("pattern", ["6:8", "8:8"])
def test_one_size_that_is_not_run_is_said_to_be_so(tmp_path: Path, pattern: str) -> None:
    results = results_of(tmp_path, cost_of_paper)
    for run in TABLES["trend"](PAPER, results):
        if run.size == "21m" and str(run.recipe.pattern) == pattern:
            del results.found[run.key]
    rows = told(results)
    assert rows["so it does at 4.8m weights, 25 tokens each, 6:8"][2] == "smaller for ternary"
    assert rows["so it does at 21m weights, 5.6 tokens each, 6:8"][2] == "not run yet"
    if pattern == "6:8":
        assert rows["so it does at 21m weights, 5.6 tokens each, 4:8"][2] == "smaller for ternary"


def test_one_seed_of_each_is_no_run_that_diverged(tmp_path: Path) -> None:
    results = results_of(tmp_path, cost_of_paper)
    for run in TABLES["claim"](PAPER, results):
        if run.seed > 0 and str(run.recipe.pattern) == "7:8":
            del results.found[run.key]
    rows = told(results)
    assert [cell.rpartition("; ")[2] for cell in rows["7:8"]] == 3 * ["too few seeds"]
    assert rows["6:8"][0].endswith(": compatible")


def test_what_the_paper_tells_is_of_changes_that_are_made(tmp_path: Path) -> None:
    assert set(paper.ABLATIONS) < set(changes(PAPER, paper.PATTERN))
    assert paper.PATTERN in ABLATED and set(paper.DEGRADATIONS) == set(PATTERNS[1:])
    assert chosen_rate(PAPER, results_of(tmp_path, cost_of_paper), "full") == 4e-3
