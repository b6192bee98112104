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
from sparse_bitnet.bench.checks import check_kernels, check_packed_linear
from sparse_bitnet.bench.packed import bench_packed
from sparse_bitnet.bench.train import TrainBench, bench_train
from sparse_bitnet.cli.main import app
from sparse_bitnet.kernels.effective_weight import reference
from sparse_bitnet.kernels.packed_linear import NATIVE, OPERATOR, PackedLayout
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


def need_native_kernels() -> None:
    obstacle = OPERATOR.obstacle(NATIVE)
    if obstacle is not None:
        pytest.skip(f"the native kernels are not built: {obstacle}")


def test_linears_are_measured_beside_the_reading_of_their_bytes() -> None:
    need_native_kernels()
    from sparse_bitnet.bench.linear import LinearBench, bench_linear

    before = torch.get_num_threads()
    formats = ("i2", "t5", "g4", "g4s2", "g4s3")
    result = bench_linear(LinearBench(64, 96, 16, 2, formats, threads=(1, 2), tokens=(1, 9), rounds=1))
    assert torch.get_num_threads() == before
    assert result["weights"] == 2 * (2 * 64 * 64 + 2 * 16 * 64 + 3 * 96 * 64)
    rows = result["linears"]
    assert [(row["tokens"], row["threads"], row["format"]) for row in rows] == [
        (tokens, threads, format) for tokens in (1, 9) for threads in (1, 2) for format in formats
    ]
    assert all(("share_of_roof" in row) == (row["tokens"] == 1) for row in rows)
    assert all(row["times_first"] == 1 for row in rows if row["format"] == "i2")
    bits = {row["format"]: 8 * row["bytes"] / result["weights"] for row in rows}
    assert bits == {"i2": 2, "t5": pytest.approx(1.6, rel=0.03), "g4": 1.5, "g4s2": 1.25, "g4s3": 1.25}


def test_packed_layers_are_measured_beside_bf16() -> None:
    rows = bench_packed([(8, 64), (4, 66)], (1, 3), CPU)
    assert [(row["shape"], row["tokens"], row["packed_bytes"]) for row in rows] == [
        ([8, 64], 1, 128), ([8, 64], 3, 128), ([4, 66], 1, 68), ([4, 66], 3, 68),
    ]  # fmt: skip
    for row in rows:
        assert row["times_bf16"] == row["bf16_ms"] / row["ours_ms"]
        assert row["share_of_copy_bandwidth"] > 0


def test_no_speed_is_told_of_a_wrong_packed_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = PackedLayout("i2", 16, "int8")
    weight = torch.zeros(4, 4, dtype=torch.uint8)
    check_packed_linear(weight, layout, (1, 9))
    monkeypatch.setattr("sparse_bitnet.kernels.dispatch.Operator.run", lambda self, x, *_: x.new_zeros(len(x), 4))
    with pytest.raises(ValueError, match=r"packed_linear is wrong on i2 and \(1, 16, 4\): no speed is told"):
        check_packed_linear(weight, layout, (1, 9))


def test_bench_linear_needs_the_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_bitnet.kernels.dispatch.Operator.obstacle", lambda self, backend: "no compiler")
    answer = CliRunner().invoke(app, ["bench", "linear"])
    assert str(answer.exception) == "bench linear measures the native kernels: no compiler"


def test_bench_linear_prints_and_writes_what_it_measures(tmp_path: Path) -> None:
    need_native_kernels()
    file = tmp_path / "linear.json"
    small = "--hidden 64 --ffn 96 --kv 16 --layers 1 --formats i2,g4s3 --threads 1 --tokens 1,9 --rounds 1"
    answer = CliRunner().invoke(app, ["bench", "linear", *small.split(), "--json", str(file)])
    assert answer.exit_code == 0, answer.output
    assert "g4s3" in answer.output
    written = json.loads(file.read_text())
    assert {"command", "commit", "versions", "seed", "cpu", "linears"} <= set(written)
    answer = CliRunner().invoke(app, ["bench", "linear", "--threads", "1,x"])
    assert str(answer.exception) == "--threads 1,x: give positive numbers, separated by commas"


@pytest.mark.parametrize("wrong", [["--shapes", "8960"], ["--shapes", "8x0"], ["--tokens", "2k"]])
def test_a_size_that_is_none_is_refused_in_a_line(wrong: list[str]) -> None:
    answer = CliRunner().invoke(app, ["bench", "products", "--device", "cpu", *wrong])
    assert isinstance(answer.exception, ValueError)
    assert str(answer.exception).startswith(f"{wrong[0]} {wrong[1]}: give")


def test_products_are_measured_beside_the_dense_one(tmp_path: Path) -> None:
    file = tmp_path / "products.json"
    sizes = ["--shapes", "64x128", "--tokens", "40", "--patterns", "6:8"]
    answer = CliRunner().invoke(app, ["bench", "products", "--device", "cpu", *sizes, "--json", str(file)])
    assert answer.exit_code == 0, answer.output
    (row,) = json.loads(file.read_text())["products"]
    assert row["times_bf16"] == pytest.approx(row["bf16_ms"] / row["ours_ms"])


SMALL_DECODE = (
    "--hidden 256 --ffn 512 --layers 2 --heads 2 --kv-heads 1 --head 128 --vocabulary 320 --prompt 40 --new-tokens 3 "
    "--rounds 2 --threads 1,2"
)


def test_bench_decode_prints_and_writes_what_it_measures(tmp_path: Path) -> None:
    need_native_kernels()
    file = tmp_path / "decode.json"
    answer = CliRunner().invoke(app, ["bench", "decode", *SMALL_DECODE.split(), "--json", str(file)])
    assert answer.exit_code == 0, answer.output
    written = json.loads(file.read_text())
    assert {"command", "commit", "versions", "seed", "cpu", "decode", "memory"} <= set(written)
    rows = written["decode"]
    assert [(row["system"], row["threads"]) for row in rows] == [("i2", 1), ("g4s3", 1), ("i2", 2), ("g4s3", 2)]
    weights = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
    assert [8 * (row["bytes"] - 320 * 256) / weights for row in rows] == [2.0, 1.25, 2.0, 1.25]
    assert all(len(row["ms_of_rounds"]) == 2 and row["tokens_per_second"] > 0 for row in rows)
    assert rows[0]["times_first"] == 1
    assert "times_rival" not in rows[0]
    for row in written["memory"]:
        assert row["written"] == 3
        assert row["cache_bytes"] == 2 * 4 * 2 * 128 * 64  # 43 positions, rounded up to a multiple of 32
        assert row["peak_bytes"] > row["libraries_bytes"]
    assert "g4s3: " in answer.output


def test_bench_decode_refuses_options_that_a_gpu_would_ignore() -> None:
    answer = CliRunner().invoke(app, ["bench", "decode", "--device", "cuda", "--new-tokens", "5"])
    assert str(answer.exception) == "--new-tokens is for a CPU: `bench generation` has the options of --device cuda"


def test_bench_decode_says_how_to_get_its_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    need_native_kernels()
    answer = CliRunner().invoke(app, ["bench", "decode", "--compare", "vllm"])
    assert str(answer.exception) == "--compare vllm: it can be compared with llama.cpp"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    answer = CliRunner().invoke(app, ["bench", "decode", "--compare", "llama.cpp"])
    assert "run `pip install llama-cpp-python gguf`" in str(answer.exception)


def test_bench_decode_beside_llama_cpp(tmp_path: Path) -> None:
    """The same weights: ValueError where the logits are not alike."""
    need_native_kernels()
    for package in ("llama_cpp", "gguf"):
        pytest.importorskip(package, reason="llama.cpp is a rival to compare with, not a dependency")
    file = tmp_path / "decode.json"
    options = [*SMALL_DECODE.split(), "--compare", "llama.cpp", "--json", str(file)]
    answer = CliRunner().invoke(app, ["bench", "decode", *options])
    assert answer.exit_code == 0, answer.exception
    written = json.loads(file.read_text())
    assert [row["system"] for row in written["decode"][:3]] == ["llama.cpp TQ2_0", "i2", "g4s3"]
    assert written["decode"][0]["times_rival"] == 1
    assert written["rival"]["correlation_of_logits"] > 0.99


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
