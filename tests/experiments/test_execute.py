"""The executor: what is missing is done, what is done is not, in workers of their own."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments import execute
from experiments.corpus import load
from experiments.results import Results
from experiments.settings import PAPER, Run, Scale
from experiments.tables import missing


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


def test_a_run_that_fails_is_told_and_the_others_go_on(
    micro: Scale, corpus_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of more sequences than the corpus has."""
    results = Results(tmp_path / "runs")
    impossible = replace(micro, batch=10**6, tokens_a_weight=(1e6,))
    clock = execute.Clock(minutes=60, share=1, rate=1e30)
    assert execute.train_missing(impossible, results, ["sweep"], corpus_directory, clock, 1, 1, None) == 0
    told = capsys.readouterr().out
    assert told.count("FAILED: ValueError") == 8 and "do not fill a step of 1000000" in told


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
