"""Tables: which runs are asked for, what waits for the sweep, and where the sweep goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.results import Results
from experiments.settings import PAPER, Run
from experiments.tables import ABLATED, ABLATIONS, TABLES, TURNS, chosen_rate, frontier, missing, sweep, trend


class Found(Results):
    """Results whose validation perplexity is a function of the run."""

    def __init__(self, tmp_path: Path, best: dict[str, float]) -> None:
        super().__init__(tmp_path)
        self.best = best

    def perplexity(self, run: Run, split: str = "test") -> float | None:
        if run.key not in self.found:
            return None
        return 50 + abs(run.learning_rate / self.best[run.recipe.values] - 1)

    def finish(self, runs: list[Run]) -> None:
        self.found.update({run.key: {} for run in runs})


def rates(runs: list[Run], values: str) -> list[float]:
    return sorted({run.learning_rate for run in runs if run.recipe.values == values})


def test_the_sweep_goes_on_where_the_best_is_at_an_end(tmp_path: Path) -> None:
    results = Found(tmp_path, {"full": 4e-3, "ternary": 32e-3})
    assert len(sweep(PAPER, results)) == 12
    assert chosen_rate(PAPER, results, "full") is None
    rounds = 0
    while runs := missing(PAPER, results, ["sweep"]):
        results.finish(runs)
        rounds += 1
    assert rounds == 4
    assert rates(sweep(PAPER, results), "full") == [2e-3, 4e-3, 8e-3]
    assert rates(sweep(PAPER, results), "ternary") == [2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3]
    assert (chosen_rate(PAPER, results, "full"), chosen_rate(PAPER, results, "ternary")) == (4e-3, 32e-3)


def test_the_sweep_goes_down_too_and_ends(tmp_path: Path) -> None:
    results = Found(tmp_path, {"full": 1e-9, "ternary": 1e9})
    while runs := missing(PAPER, results, ["sweep"]):
        results.finish(runs)
    assert (chosen_rate(PAPER, results, "full"), chosen_rate(PAPER, results, "ternary")) == (2.5e-4, 64e-3)


def test_other_tables_wait_for_the_sweep(tmp_path: Path) -> None:
    results = Found(tmp_path, {"full": 4e-3, "ternary": 4e-3})
    assert [name for name in TABLES if TABLES[name](PAPER, results)] == ["sweep", "trend-sweep"]
    results.finish(sweep(PAPER, results))
    asked = {name: TABLES[name](PAPER, results) for name in TABLES}
    assert {name: len(runs) for name, runs in asked.items()} == {
        "sweep": 12, "claim": 7 * 2 * 3, "ablations": 2 * 7 * 3, "frontier": 14 * 3,
        "trend-sweep": 3 * 12, "trend": 0, "larger": 2 * 3 * (3 + 1),
    }  # fmt: skip
    assert all((run.seed == PAPER.sweep_seed) == name.endswith("sweep") for name in asked for run in asked[name])
    seeds = [run.seed for run in asked["claim"]]
    assert seeds == sorted(seeds)  # what is cut short holds whole seeds


def test_each_size_of_the_trend_has_rates_of_its_own(tmp_path: Path) -> None:
    class BySize(Found):
        def perplexity(self, run: Run, split: str = "test") -> float | None:
            return None if run.key not in self.found else 50 + abs(run.learning_rate - 2e-3)  # as it is at every size

    results = BySize(tmp_path, {})
    while runs := missing(PAPER, results, ["sweep", "trend-sweep"]):
        results.finish(runs)
    asked = trend(PAPER, results)
    assert len(asked) == 3 * 3 * 2 * 3
    assert {run.size: run.learning_rate for run in asked} == pytest.approx({"1.8m": 2e-3, "4.8m": 1.5e-3, "21m": 2e-3})
    assert len({(run.size, run.learning_rate) for run in asked}) == 3
    assert chosen_rate(PAPER.of_trend("21m"), results, "full") == 4e-3  # told as of the smallest size
    assert {(run.tokens, run.batch, run.zero_shot) for run in asked} == {(PAPER.trend_tokens, 128, False)}
    assert not {run.key for run in asked} & {run.key for run in missing(PAPER, results, ["claim", "larger"])}
    sizes = [run.size for run in asked if run.seed == 0]
    assert sizes == sorted(sizes, key=PAPER.sizes.index)


def test_runs_that_tables_share_are_asked_for_once(tmp_path: Path) -> None:
    results = Found(tmp_path, {"full": 4e-3, "ternary": 4e-3})
    results.finish(sweep(PAPER, results))
    claimed = missing(PAPER, results, ["claim"])
    results.finish(claimed)
    more = missing(PAPER, results, ["frontier", "ablations"])
    assert len(more) == (7 + 2 * (len(ABLATIONS) - 1 + len(TURNS))) * 3
    assert not {run.key for run in more} & {run.key for run in claimed}
    ternary = {str(run.recipe.pattern) for run in claimed if run.recipe.values == "ternary"}
    assert set(ABLATED) <= ternary
    sherry = [run for run in frontier(PAPER, results) if run.residual]
    assert {(str(run.recipe.pattern), run.recipe.values) for run in sherry} == {("3:4", "sign")}


@pytest.mark.parametrize("values", ["full", "ternary"])
def test_a_rate_at_which_training_diverges_is_not_chosen(tmp_path: Path, values: str) -> None:
    class Diverging(Found):
        def perplexity(self, run: Run, split: str = "test") -> float | None:
            found = super().perplexity(run, split)
            return float("inf") if found is not None and run.learning_rate > 4e-3 else found

    results = Diverging(tmp_path, {"full": 1.0, "ternary": 1.0})
    while runs := missing(PAPER, results, ["sweep"]):
        results.finish(runs)
    assert chosen_rate(PAPER, results, values) == 4e-3
