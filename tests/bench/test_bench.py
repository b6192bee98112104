"""Benchmarks: an honest baseline, a refusal to time a kernel that is wrong, and results that say what made them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sparse_bitnet import Recipe, SparseBitLinear
from sparse_bitnet.bench.baselines import PlainLinear, exchange_for_plain, plain_effective_weight
from sparse_bitnet.bench.checks import check_kernels
from sparse_bitnet.bench.train import TrainBench, bench_train
from sparse_bitnet.cli.main import app
from sparse_bitnet.kernels.effective_weight import reference
from sparse_bitnet.numerics.ternary import effective_weight
from sparse_bitnet.recipe import NMPattern

CPU = torch.device("cpu")
SMALL = TrainBench("tiny", sequence=32, batch=2, vocabulary=300, steps=2, rounds=1)


@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
def test_the_plain_layer_computes_what_ours_does(pattern: str) -> None:
    weight = torch.randn(16, 32)
    plain = plain_effective_weight(weight, NMPattern.parse(pattern), torch.float32)
    torch.testing.assert_close(plain, effective_weight(weight, Recipe(pattern), (), torch.float32))
    layer = nn.Sequential(nn.Linear(32, 16))
    ours = SparseBitLinear.from_linear(layer[0], Recipe(pattern))  # type: ignore[arg-type]
    exchange_for_plain(layer, NMPattern.parse(pattern))
    assert isinstance(layer[0], PlainLinear)
    x = torch.randn(4, 32)
    torch.testing.assert_close(layer(x), ours(x))


def test_systems_are_measured_side_by_side() -> None:
    result = bench_train(SMALL, CPU)
    rows = {row["system"]: row for row in result["systems"]}
    assert list(rows) == ["dense", "plain", "ours"]
    assert rows["dense"]["times_dense"] == 1
    assert all(row["tokens_per_second"] > 0 and row["share_of_matmul_rate"] > 0 for row in rows.values())
    assert rows["ours"]["first_loss"] == pytest.approx(rows["plain"]["first_loss"], rel=1e-3)
    assert rows["ours"]["first_loss"] != rows["dense"]["first_loss"]


def test_accumulation_and_checkpointing_keep_the_first_loss() -> None:
    settings = {"preset": "tiny", "sequence": 32, "vocabulary": 300, "steps": 1, "rounds": 1, "systems": ("ours",)}
    whole = bench_train(TrainBench(batch=1, **settings), CPU)["systems"][0]
    checkpointed = bench_train(TrainBench(batch=1, gradient_checkpointing=True, **settings), CPU)["systems"][0]
    assert checkpointed["first_loss"] == pytest.approx(whole["first_loss"], rel=1e-6)
    assert TrainBench(batch=2, accumulation=3, **settings).tokens == 2 * 3 * 32


def test_sparse_products_are_chosen_by_measurement() -> None:
    settings = {"preset": "tiny", "sequence": 32, "vocabulary": 300, "steps": 1, "rounds": 1}
    rows = bench_train(TrainBench(batch=1, systems=("ours", "sparse"), **settings), CPU)["systems"]
    assert set(rows[1]["sparse_forward_gains"]) == {"192 x 192", "64 x 192", "512 x 192", "192 x 512"}
    assert rows[1]["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=1e-4)


def test_a_system_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast' is no system to measure: choose from dense, plain"):
        bench_train(TrainBench(systems=("dense", "fast")), CPU)


@pytest.mark.parametrize("module", ["effective_weight", "quantize_activation"])
def test_no_speed_is_told_of_a_wrong_kernel(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_kernels([(8, 16)], Recipe("6:8"), torch.float32, CPU)
    if module == "effective_weight":

        def wrong_weight(weights: list, recipe: Recipe, parts: list, out: list, scale: torch.Tensor) -> None:
            reference.run(weights, recipe, parts, out, scale)
            out[0][0, 0] += 1

        monkeypatch.setattr("sparse_bitnet.kernels.dispatch.Operator.run", lambda self, *args: wrong_weight(*args))
    else:
        monkeypatch.setattr("sparse_bitnet.bench.checks.fake_quantize_activation", lambda x, *_: x + 1)
    with pytest.raises(ValueError, match=f"{module} is wrong on .*: no speed is told"):
        check_kernels([(8, 16)], Recipe("6:8"), torch.float32, CPU)


def test_the_commands_print_and_write_what_they_measure(tmp_path: Path) -> None:
    kernels, train = tmp_path / "kernels.json", tmp_path / "train.json"
    run = CliRunner().invoke
    small = "--device cpu --rows 16 --columns 32 --tokens 8 --patterns 2:4"
    answer = run(app, ["bench", "kernels", *small.split(), "--json", str(kernels)])
    assert answer.exit_code == 0, answer.output
    assert "effective_weight" in answer.output
    small = (
        "--device cpu --preset tiny --sequence 32 --batch 1 --vocabulary 300 --steps 1 --rounds 1 --systems dense,ours"
    )
    answer = run(app, ["bench", "train", *small.split(), "--json", str(train)])
    assert answer.exit_code == 0, answer.output
    assert "ours" in answer.output
    for file, figures in ((kernels, "kernels"), (train, "systems")):
        written = json.loads(file.read_text())
        assert {"command", "commit", "versions", "seed", "gpus", figures} <= set(written)
