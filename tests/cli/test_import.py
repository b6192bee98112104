"""`sparse-bitnet import` as a user calls it: what it prints, writes and refuses, and that its output goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from sparse_bitnet.nn.stored_settings import named_layers

Command = Callable[..., object]


def test_a_dense_checkpoint_becomes_one_to_train_pack_and_score(
    dense: Path, short_text: Path, corpus_file: Path, command: Command, tmp_path: Path
) -> None:
    output, figures = tmp_path / "latent", tmp_path / "figures.json"
    arguments = (
        "--criterion",
        "activation",
        "--calibration",
        corpus_file,
        "--calibration-tokens",
        500,
        "--text",
        short_text,
    )
    answer = command("import", dense, output, "--pattern", "2:4", *arguments, "--json", figures)
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert [line.partition("perplexity")[0].strip() for line in lines[:3]] == ["as it came", "2:4", "2:4, ternary"]
    assert lines[3].startswith(f"{output}: 14 layers") and lines[3].endswith(
        "2:4, ternary, starting mask by activation"
    )
    written = json.loads(figures.read_text())
    assert list(written["perplexity"]) == ["as it came", "2:4", "2:4, ternary"]
    assert written["pattern"] == "2:4" and written["criterion"] == "activation" and written["summary"]["holds_pattern"]
    shown = command("eval", "ppl", dense, "--text", short_text, "--json", tmp_path / "before.json")
    assert shown.code == 0
    before = json.loads((tmp_path / "before.json").read_text())
    assert before["perplexity"] == pytest.approx(written["perplexity"]["as it came"]["perplexity"], rel=1e-6)
    run = [
        f"output_dir={tmp_path / 'run'}",
        f"model.source={output}",
        f"data.files=[{corpus_file}]",
        "recipe.pattern=2:4",
    ]
    settings = tmp_path / "train.yaml"
    settings.write_text("training: {steps: 2, block_size: 32, batch_size: 2, warmup_steps: 1}\n")
    answer = command("train", settings, *run)
    assert answer.code == 0, answer.err
    assert command("convert", tmp_path / "run" / "model", tmp_path / "packed").code == 0
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert len(list(named_layers(opened))) == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--criterion", "random"], "--criterion random is not one of magnitude, activation"),
        (["--criterion", "activation"], "--criterion activation and --calibration FILE need each other"),
        (["--pattern", "6:9"], "in_features=64 is not a multiple of m=9"),
        (["--values", "binary"], "values='binary' is not one of ternary, sign, full"),
        (["--text", "nowhere.txt"], "nowhere.txt: no such file or directory"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    dense: Path, command: Command, tmp_path: Path, arguments: list[str], message: str
) -> None:
    answer = command("import", dense, tmp_path / "latent", *arguments)
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1, answer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]
