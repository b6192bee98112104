"""The numbers behind charts and tables, against counts by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparse_bitnet.report import series
from sparse_bitnet.report.runs import LogEvent, Run, read_runs
from sparse_bitnet.report.tables import comparison, different_settings


def run_of(events: list[LogEvent], tokens_per_step: int | None = 10) -> Run:
    environment = {} if tokens_per_step is None else {"tokens_per_step": tokens_per_step}
    return Run("run", Path("run"), {}, environment, events, [], [], [])


def test_long_curves_become_means_of_neighbours() -> None:
    run = run_of([LogEvent(step=step, loss=step) for step in range(1, 1001)])
    steps, losses = series.curve(run, "loss", points=300)
    assert (steps[:2], losses[:2]) == ([4, 8], [2.5, 6.5])
    assert (steps[-1], len(steps)) == (1000, 250)
    assert series.curve(run, "loss", points=1000)[1] == list(range(1, 1001))
    assert series.curve(run, "zeros") == ([], [])


def test_the_end_is_the_last_twentieth() -> None:
    run = run_of([LogEvent(step=step, loss=step) for step in range(1, 101)])
    assert series.at_the_end(run, "loss") == 98
    assert series.at_the_end(run, "zeros") is None
    assert series.at_the_end(run_of([]), "loss") is None


def test_a_pause_does_not_slow_the_run() -> None:
    times = [0, 2, 4, 1000, 1002]
    run = run_of([LogEvent(step=step, loss=1, time=time) for step, time in enumerate(times)])
    assert series.tokens_per_second(run) == 5
    assert series.tokens_per_second(run_of(run.events, None)) is None
    assert series.tokens_per_second(run_of([LogEvent(step=1, loss=1)])) is None


def test_flips_by_a_change_of_the_pattern_do_not_count() -> None:
    patterns = ["4:4", "4:4", "2:4", "2:4"]
    events = [LogEvent(step=i, loss=1, pattern=pattern, flip_rate=i / 10) for i, pattern in enumerate(patterns, 1)]
    assert series.curve(run_of(events), "flip_rate") == ([1, 2, 4], [0.1, 0.2, 0.4])
    assert series.curve(run_of(events), "loss")[0] == [1, 2, 3, 4]


def test_layers_are_grouped_by_kind_and_ordered_by_number() -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (10, 2)] + ["model.layers.0.mlp.experts.3.up"]
    assert series.layers_by_kind(names) == {"q_proj": [names[1], names[0]], "up": [names[2]]}
    twins = ["h.0.self.q", "h.0.cross.q", "proj"]
    assert series.layers_by_kind(twins) == {"self.q": ["h.0.self.q"], "cross.q": ["h.0.cross.q"], "proj": ["proj"]}


def test_the_map_holds_the_zeros_of_every_layer(trained_runs: list[Path]) -> None:
    run = read_runs(trained_runs)[1]
    found = series.layer_map(run)
    assert found is not None
    assert found.zeros.shape == (28, 6)
    assert [count for _, count in found.groups] == [4] * 7
    row = found.layers.index("model.layers.2.mlp.up_proj")
    assert list(found.zeros[row]) == [event.layers["model.layers.2.mlp.up_proj"].zeros for event in run.events]
    assert found.zeros[:, :3].max() < 0.5 <= found.zeros[:, 3:].min()


def test_the_densities_are_all_weights(trained_runs: list[Path]) -> None:
    sparse, dense_first = read_runs(trained_runs)
    assert series.ternary_weights(sparse) == 4 * (192 * 192 * 2 + 192 * 64 * 2 + 3 * 192 * 512)
    kept, masked = series.densities(sparse.moments[-1])
    assert (kept.sum(), masked.sum()) == (pytest.approx(75), pytest.approx(25))
    assert series.densities(dense_first.moments[-1])[1].sum() == pytest.approx(50)
    assert np.allclose(series.density_over_time(sparse).sum(axis=0), 100)
    assert series.density_over_time(sparse).shape == (96, 7)


def test_the_table_marks_the_lowest_loss_and_tells_the_settings_that_differ(trained_runs: list[Path]) -> None:
    runs = read_runs(trained_runs)
    rows = {row.label: row for row in comparison(runs)}
    losses = [run.validations[-1].eval_loss for run in runs]
    assert rows["validation loss, last"].cells == tuple(f"{loss:.4f}" for loss in losses)
    assert rows["validation loss, last"].best == (losses.index(min(losses)),)
    assert rows["method"].cells[1] == "2:4, ternary, int8 activations, dense until 50 % of the steps"
    assert rows["steps"].cells == ("6 of 6", "6 of 6")
    assert rows["tokens seen"].cells == ("192", "192")
    assert {row.label: row.cells for row in different_settings(runs)} == {
        "recipe.pattern": ("6:8", "2:4"),
        "schedule.kind": ("sparse", "dense-to-sparse"),
    }
    assert all(row.best == () for row in comparison(runs[:1]))
