"""The executor: what is missing is done, what is done is not, in workers of their own."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments import execute
from experiments.corpus import load
from experiments.results import Results
from experiments.settings import PAPER, Run, Scale, ternary
from experiments.tables import TABLES, missing
from experiments.workers import Worker, end, free
from tests.experiments.planned_trainer import PLAN, PlannedTrainer, attempts


def test_workers_do_what_is_missing_and_pack_it(micro: Scale, corpus_directory: Path, tmp_path: Path) -> None:
    results, archive = Results(tmp_path / "runs"), tmp_path / "sweep.tar.xz"
    clock = execute.Clock(minutes=5, share=1)
    clock.rate = 1e12
    done = execute.train_missing(micro, results, ["sweep"], corpus_directory, clock, gpus=1, workers=1, pack=archive)
    assert done == len(results.found) >= 8
    assert missing(micro, results, ["sweep"]) == []
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "elsewhere", filter="data")
    assert Results(tmp_path / "elsewhere").found == results.found
    again = execute.train_missing(micro, results, ["sweep"], corpus_directory, clock, gpus=1, workers=1, pack=None)
    assert again == 0


def test_no_run_is_started_that_would_end_too_late(micro: Scale, tmp_path: Path) -> None:
    clock = execute.Clock(minutes=0.1, share=1)
    done = execute.train_missing(micro, Results(tmp_path), ["sweep"], tmp_path / "unread", clock, 1, 1, None)
    assert done == 0


def test_a_run_that_is_too_long_lets_shorter_ones_go_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = [ternary(PAPER, size, "6:8", 0, 8e-3) for size in ("21m", "1.8m")]
    monkeypatch.setitem(TABLES, "planned", lambda scale, results: runs)
    (tmp_path / PLAN).write_text("{}")
    results, clock = Results(tmp_path / "runs"), execute.Clock(minutes=2, share=1)
    assert clock.expected(runs[1]) < 120 < clock.expected(runs[0])
    execute.train_missing(PAPER, results, ["planned"], tmp_path, clock, 1, 1, None, PlannedTrainer)
    assert list(results.found) == [runs[1].key, runs[0].key]  # the short one took a second: now the other fits


def planned(
    monkeypatch: pytest.MonkeyPatch, data: Path, plans: list[list[tuple[float, str]]], gpus: int, workers: int
) -> tuple[list[Run], int]:
    """Execute a table of as many runs as there are plans; the runs, and how many of them were done."""
    runs = [ternary(PAPER, "1.8m", "6:8", seed, 8e-3) for seed in range(len(plans))]
    monkeypatch.setitem(TABLES, "planned", lambda scale, results: runs)
    (data / PLAN).write_text(json.dumps({run.key: plan for run, plan in zip(runs, plans, strict=True)}))
    clock, results = execute.Clock(minutes=60, share=1), Results(data / "runs")
    done = execute.train_missing(PAPER, results, ["planned"], data, clock, gpus, workers, None, PlannedTrainer)
    assert done == len(results.found)
    return runs, done


@pytest.mark.parametrize(
    ("ending", "reason"),
    [("raise", "RuntimeError: CUDA error: an illegal"), ("die", "its process ended with exit code 3")],
)
def test_a_run_that_fails_once_is_repeated_in_a_fresh_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str, reason: str
) -> None:
    runs, done = planned(monkeypatch, tmp_path, [[(0, ending)], [], [], []], gpus=2, workers=1)
    told = capsys.readouterr().out
    assert done == 4 and told.count(f"{runs[0].name} failed once: {reason}") == 1 and "FAILED" not in told
    (first, second), *others = (attempts(tmp_path, run) for run in runs)
    assert first["pid"] != second["pid"]
    assert [len(other) for other in others] == [1, 1, 1] and first["pid"] not in {other[0]["pid"] for other in others}
    assert {attempt["gpu"] for attempt in (first, second, *(other[0] for other in others))} == {0, 1}


def test_a_run_that_fails_twice_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = [[], [(0, "raise"), (0, "die"), (0, "raise")], [], []]
    runs, done = planned(monkeypatch, tmp_path, plans, gpus=1, workers=1)
    told = capsys.readouterr().out
    assert done == 3 and told.count("FAILED") == told.count(f"{runs[1].name} FAILED: its process ended") == 1
    assert [len(attempts(tmp_path, run)) for run in runs] == [1, 2, 1, 1]
    before, failing, after, last = (attempts(tmp_path, run)[-1]["pid"] for run in runs)
    assert len({before, failing, after}) == 3 and after == last


@pytest.mark.parametrize("beside", ["raise", "succeed"])
def test_a_gpu_where_a_run_failed_gets_fresh_processes_when_the_run_beside_it_has_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, beside: str
) -> None:
    """Under MPS a fault is one of all processes of a GPU, and none is admitted before all of them have ended."""
    runs, done = planned(monkeypatch, tmp_path, [[(0, "raise")], [(1, beside)], []], gpus=1, workers=2)
    assert done == 3
    faulty = [attempts(tmp_path, run)[0] for run in runs[:2]]
    later = [attempt for run in runs for attempt in attempts(tmp_path, run) if attempt not in faulty]
    assert len(later) == 2 + (beside == "raise")
    assert min(attempt["begin"] for attempt in later) > max(attempt["end"] for attempt in faulty)
    assert not {attempt["pid"] for attempt in later} & {attempt["pid"] for attempt in faulty}


def test_a_process_that_died_without_a_run_is_replaced(tmp_path: Path) -> None:
    (tmp_path / PLAN).write_text("{}")
    run, worker = ternary(PAPER, "1.8m", "6:8", 0, 8e-3), Worker(0, tmp_path, PlannedTrainer)
    worker.begin(run)
    assert isinstance(worker.finish()[1], dict) and worker.process is not None
    worker.process.kill()
    worker.process.join()
    worker.begin(run)
    assert worker.finish() == (run, "its process ended with exit code -9")
    assert free([worker]) == [worker]
    worker.begin(run)
    assert isinstance(worker.finish()[1], dict)
    end([worker])


def test_the_clock_learns(micro: Scale) -> None:
    clock = execute.Clock(minutes=9, share=2)
    run: Run = missing(PAPER, Results("nowhere"), ["sweep"])[0]
    assert clock.expected(run) == execute.OVERHEAD + 2 * run.operations / execute.OPERATIONS_A_SECOND
    clock.learn(run, execute.OVERHEAD + 100)
    assert clock.expected(run) == pytest.approx(execute.OVERHEAD + 100)


def test_the_command_lists_and_refuses(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(execute.execute)
    listed = CliRunner().invoke(app, ["sweep", "--dry-run", "--out", str(tmp_path)])
    assert listed.exit_code == 0 and "12 runs" in listed.output
    refused = CliRunner().invoke(app, ["swep", "--out", str(tmp_path)])
    assert refused.exit_code == 2 and "'swep' is no table" in " ".join(refused.output.split())
    without = CliRunner().invoke(app, ["sweep", "--data", "nowhere", "--out", str(tmp_path)])
    assert without.exit_code == 2 and "nowhere holds no corpus" in " ".join(without.output.split())
    (tmp_path / "corpus.json").write_text('{"vocabulary": 513}')
    larger = CliRunner().invoke(app, ["sweep", "--toy", "--data", str(tmp_path), "--out", str(tmp_path / "runs")])
    told = " ".join(larger.output.replace("\u2502", " ").split())
    assert larger.exit_code == 2 and "513 tokens, and these models take 512" in told


def test_a_damaged_or_missing_corpus_is_told(corpus_directory: Path, tmp_path: Path) -> None:
    import torch

    with pytest.raises(ValueError, match=r"holds no corpus: python -m experiments\.corpus"):
        load(tmp_path, torch.device("cpu"))
    for file in corpus_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    described = json.loads((tmp_path / "corpus.json").read_text())
    described["sha256"]["valid"] = "0" * 64
    (tmp_path / "corpus.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"valid\.uint16\.xz is not the file"):
        load(tmp_path, torch.device("cpu"))
