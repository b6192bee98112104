"""Verdicts follow from the results: the same claims on results made to hold them, and to hold their contrary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import paper
from experiments.results import Results
from experiments.section_verdict import in_short, seeds_to_tell
from experiments.settings import PAPER, Run, Scale
from experiments.tables import TABLES, missing

SCATTER = {100: 1.0, 0: 1.0, 1: 1.002, 2: 0.998}  # by seed, beside that of the dense model


def cost_of_paper(run: Run) -> float:
    """What the pattern costs there, and what the change of the method does."""
    pattern = str(run.recipe.pattern)
    costs = paper.DEGRADATIONS.get(pattern)
    if costs is None:
        return 1.0
    change = paper.ABLATIONS["mask from the quantised weights"] if run.recipe.mask_from == "quantized" else 1.0
    return costs[run.recipe.values == "ternary"] * change


def results_of(directory: Path, cost: Callable[[Run], float], zeros: float = paper.ZEROS) -> Results:
    """Results of every run that a table asks for, with a perplexity of 50 times what its settings cost."""
    results = Results(directory)
    while runs := missing(PAPER, results, list(TABLES)):
        for run in runs:
            scatter = SCATTER[run.seed] if not run.recipe.pattern.is_dense else 1.0
            found: dict[str, Any] = {
                "diverged_at": None,
                "perplexity": {"valid": 50 + abs(run.learning_rate - 4e-3), "test": 50 * cost(run) * scatter},
                "readings": [{"zeros": zeros}],
            }
            results.found[run.key] = found
    return results


def told(scale: Scale, results: Results) -> dict[str, tuple[str, str]]:
    """Claim -> what is found here, and the verdict."""
    lines = in_short(scale, results).split("## What reproduces")[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {claim: (here, verdict) for claim, _, here, verdict in rows[2:]}


def test_results_as_the_papers_reproduce_it(tmp_path: Path) -> None:
    results = results_of(tmp_path, cost_of_paper)
    rows = told(PAPER, results)
    assert rows["sparsity costs ternary less"] == ("smaller for ternary at 7:8, 6:8, 5:8, 4:8, 3:8, 2:8", "yes")
    assert all(rows[claim][1] == "yes" for claim in rows if claim.startswith("so it does at"))
    assert rows["6:8 costs BF16"] == ("1.050 ± 0.002", "as there")
    assert rows["4:8 costs ternary"][1] == "as there"
    assert rows["zeros of trained ternary weights"] == ("0.420 ± 0.000", "as there")
    assert rows["mask from the quantised weights is worse"][1] == "yes; at 6:8 as there"
    assert rows["masked gradient is worse"][1] == "no difference can be told"
    assert seeds_to_tell(PAPER, results) == "* These seeds tell a difference at every pattern."


def test_contrary_results_contradict_it(tmp_path: Path) -> None:
    def turned(run: Run) -> float:
        return 1.0 if run.recipe.pattern.is_dense else 1.02 if run.recipe.values == "full" else 1.06

    rows = told(PAPER, results_of(tmp_path, turned, zeros=0.5))
    here, verdict = rows["sparsity costs ternary less"]
    assert here == "smaller for ternary at no pattern and larger at 7:8, 6:8, 5:8, 4:8, 3:8, 2:8"
    assert verdict == "not at 6 of 6"
    assert rows["6:8 costs BF16"][1] == "less than there"
    assert rows["6:8 costs ternary"][1] == "more than there"
    assert rows["zeros of trained ternary weights"][1] == "more than there"


def test_what_cannot_be_told_asks_for_seeds(tmp_path: Path) -> None:
    def nearly_alike(run: Run) -> float:
        return 1.0 if run.recipe.pattern.is_dense else 1.032 if run.recipe.values == "full" else 1.03

    results = results_of(tmp_path, nearly_alike)
    assert told(PAPER, results)["sparsity costs ternary less"][1] == "at 0 of 6, the rest is not told"
    assert "at 7:8 24 seeds" in seeds_to_tell(PAPER, results)


@pytest.mark.parametrize("pattern", ["6:8", "4:8"])
def test_one_size_that_is_not_run_is_said_to_be_so(tmp_path: Path, pattern: str) -> None:
    results = results_of(tmp_path, cost_of_paper)
    for run in TABLES["trend"](PAPER, results):
        if run.size == "21m" and str(run.recipe.pattern) == pattern:
            del results.found[run.key]
    rows = told(PAPER, results)
    of_size = {size: row for claim, row in rows.items() for size in PAPER.sizes if f"at {size} weights" in claim}
    assert of_size["4.8m"][1] == "yes"
    assert of_size["21m"][1] == "not run yet"
