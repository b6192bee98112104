"""Reading the files of a run, whole, cut short and missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sparse_bitnet.report.runs import read_run, read_runs


@pytest.fixture
def run_copy(trained_runs: list[Path], tmp_path: Path) -> Path:
    """A run without its model and checkpoints, to be damaged."""
    copy = tmp_path / "run"
    copy.mkdir()
    for file in trained_runs[0].glob("*.*"):
        shutil.copy(file, copy)
    return copy


def test_a_whole_run_is_read_whole(trained_runs: list[Path]) -> None:
    sparse, dense_first = read_runs(trained_runs)
    assert [event.step for event in sparse.events] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in sparse.validations] == [2, 4, 6]
    assert [moment.step for moment in sparse.moments] == [0, 1, 2, 3, 4, 5, 6]
    assert [event.pattern for event in dense_first.events] == ["4:4"] * 3 + ["2:4"] * 3
    assert all(len(event.layers) == 28 for event in sparse.events)
    assert (sparse.steps_planned, sparse.tokens_per_step) == (6, 32)
    assert (sparse.remarks, sparse.name, dense_first.name) == ([], "sparse", "dense-first")


def test_a_killed_run_is_read_up_to_its_broken_line(run_copy: Path) -> None:
    metrics = run_copy / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-700])
    run = read_run(run_copy, "run")
    assert [event.step for event in run.events][-1] == 6 - 1 + (len(run.validations) == 3)
    last = len(metrics.read_text().splitlines())
    assert run.remarks == [f"metrics.jsonl: line {last} cannot be read and is left out"]


def test_lines_that_are_no_json_or_lack_their_fields_are_counted(run_copy: Path) -> None:
    with (run_copy / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"step": 7}\n{"step": "x", "loss": 1}\n')
    run = read_run(run_copy, "run")
    assert len(run.events) == 6
    assert run.remarks == ["metrics.jsonl: line 10 and 3 more cannot be read and is left out"]


def test_a_run_of_before_histograms_and_times_says_what_is_missing(run_copy: Path) -> None:
    (run_copy / "histograms.jsonl").unlink()
    lines = [json.loads(line) for line in (run_copy / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
    (run_copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(run_copy, "run")
    assert len(run.events) == 6
    assert "no histograms.jsonl, hence no histograms" in run.remarks[0]


def test_settings_and_environment_may_be_missing_or_broken(run_copy: Path) -> None:
    (run_copy / "config.yaml").write_text("a: [")
    (run_copy / "env.json").unlink()
    run = read_run(run_copy, "run")
    assert (run.config, run.environment, run.steps_planned, run.tokens_per_step) == ({}, {}, None, None)
    assert len(run.remarks) == 2


def test_a_run_that_has_not_logged_yet_is_read_beside_others_but_not_alone(
    run_copy: Path, trained_runs: list[Path]
) -> None:
    (run_copy / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="nothing is logged yet: wait for training"):
        read_runs([run_copy])
    assert read_runs([run_copy, trained_runs[1]])[0].remarks == ["nothing is logged yet"]


def test_what_is_no_run_is_refused(tmp_path: Path, run_copy: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not a directory: give the output_dir"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"holds no metrics.jsonl and no config.yaml"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="is given twice"):
        read_runs([run_copy, run_copy / ".." / "run"])


def test_runs_of_one_name_are_told_apart_by_where_they_are(run_copy: Path, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        shutil.copytree(run_copy, tmp_path / parent / "run")
    names = [run.name for run in read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run", run_copy])]
    assert names == ["a/run", "b/run", f"{tmp_path.name}/run"]
