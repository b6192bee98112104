"""`bench generation`: a step is what transformers writes, its refusals, and the commands."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from sparse_bitnet import PackedLinear, Recipe, convert, prepare
from sparse_bitnet.bench.checks import by_reference, check_layers, check_likeness
from sparse_bitnet.bench.generation import GenerationBench, bench_generation
from sparse_bitnet.cli.main import app
from sparse_bitnet.engine.cuda_graphs import GROUPED, Sequences, attention

CPU = torch.device("cpu")
SMALL = "--device cpu --preset tiny --vocabulary 320 --context 6 --repeats 1"


def language_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, eos_token_id=None,
    )  # fmt: skip
    return convert(prepare(Qwen2ForCausalLM(config).eval().requires_grad_(False), Recipe("6:8")), "i2")


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_write_what_transformers_generates(compiled: bool) -> None:
    model, prompt = language_model(), torch.randint(1, 64, (3, 5), generator=torch.Generator().manual_seed(1))
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    work = Sequences(model, 3, 16)
    work.begin(work.read(prompt).argmax(-1, keepdim=True), 5)
    written = [work.token.clone()]
    step = work.greedy(work.step)
    if compiled:
        step = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)
    with attention(model, GROUPED):
        for _ in range(5):
            step()
            written.append(work.token.clone())
    assert isinstance(expected, Tensor) and torch.equal(torch.cat(written, dim=1), expected[:, 5:])
    assert len(set(expected[0, 5:].tolist())) > 2  # it does not write one token for ever
    assert int(work.position) == 10


@torch.no_grad()
def test_no_speed_is_told_of_another_model() -> None:
    model = language_model()
    check_layers(model, (1, 4), torch.float32)
    logits = torch.randn(3, 64)
    assert check_likeness(logits + 0.01 * torch.randn(3, 64), logits) > 0.99
    with pytest.raises(ValueError, match=r"the logits correlate with the reference's by .* alone: no speed is told"):
        check_likeness(torch.cat([logits[:2], logits[:1]]), logits)
    layer = model.model.layers[1].mlp.up_proj
    assert isinstance(layer, PackedLinear)
    layer.fast = lambda x: torch.zeros(*x.shape[:-1], 96)
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.up_proj with 4 tokens is not the reference's: no speed is told"
    ):
        check_layers(model, (4,), torch.float32)
    with by_reference(model):
        assert layer.fast is None
    assert layer.fast is not None


def test_memory_is_that_of_the_layers() -> None:
    bench = GenerationBench("tiny", ("dense", "2:4"), (), (3,), vocabulary=320, repeats=1)
    *_, result = bench_generation(bench, CPU)
    dense, packed = result["memory"]
    weights = 4 * (2 * 192 * 192 + 2 * 64 * 192 + 3 * 192 * 512)
    biases = 4 * (192 + 64 + 64)
    assert dense["linears_bytes"] == 4 * (weights + biases)
    assert packed["linears_bytes"] == weights // 4 + 4 * biases + 4 * 4 * 7
    assert dense["state_bytes"] - dense["linears_bytes"] == packed["state_bytes"] - packed["linears_bytes"]
    assert packed["share_of_dense"]["linears_bytes"] == packed["linears_bytes"] / dense["linears_bytes"]


def test_what_is_measured_stays_where_a_measurement_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparse_bitnet.bench.generation._prefill", stop)
    file = tmp_path / "generation.json"
    CliRunner().invoke(
        app, ["bench", "generation", "--batch", "1", "--prompt", "7", *SMALL.split(), "--json", str(file)]
    )
    told = [(row["system"], row["batch"]) for row in json.loads(file.read_text())["decode"]]
    assert told == [("dense", 1), ("6:8", 1), ("2:4", 1)]


@pytest.mark.parametrize(
    ("command", "decoded", "read"),
    [("generation --batch 1,2 --prompt 7", [1, 2], [7]), ("prefill --prompt 5,7", [], [5, 7])],
)
def test_the_commands_write_what_they_measure(
    command: str, decoded: list[int], read: list[int], tmp_path: Path
) -> None:
    small = SMALL if "generation" in command else SMALL.replace("--context 6", "")
    file = tmp_path / "generation.json"
    answer = CliRunner().invoke(app, ["bench", *command.split(), *small.split(), "--json", str(file)])
    assert answer.exit_code == 0, answer.exception
    written = json.loads(file.read_text())
    systems = ("dense", "6:8", "2:4")
    assert [(row["batch"], row["system"]) for row in written["decode"]] == list(product(decoded, systems))
    assert [(row["tokens"], row["system"]) for row in written["prefill"]] == list(product(read, systems))
    for row in written["decode"] + written["prefill"]:
        assert row["likeness"] > 0.999 and row["tokens_per_second"] > 0 and row["times_dense"] > 0
    assert {"commit", "versions", "seed", "settings"} <= set(written)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch 0", "--batch 0: give positive numbers"),
        ("--preset huge", "preset 'huge' is unknown: choose from tiny"),
        ("--systems dense,6-8", "6-8"),
        ("--batch= --prompt=", "nothing to measure"),
        ("--inductor max_autotune,faster", "torch.compile has no option 'faster'"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(options: str, message: str) -> None:
    answer = CliRunner().invoke(app, ["bench", "generation", *options.split()])
    assert isinstance(answer.exception, ValueError) and message in str(answer.exception)
    assert "\n" not in str(answer.exception)
