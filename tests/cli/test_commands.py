"""The commands on a small model: what they print and write, and that a mistake is one line and exit status 2."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_bitnet.formats import i2
from sparse_bitnet.kernels.packed_linear import NATIVE, OPERATOR
from sparse_bitnet.nn.stored_settings import named_layers

Command = Callable[..., object]


@pytest.fixture
def packed(latent: Path, command: Command, tmp_path: Path) -> Path:
    assert command("convert", latent, tmp_path / "packed").code == 0
    return tmp_path / "packed"


def assert_one_line(answer, message: str) -> None:
    assert answer.code == 2, answer
    assert message in answer.err
    assert answer.err.count("\n") == 1
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    "name",
    ["", "demo", "init", "train", "convert", "inspect", "eval", "eval ppl", "generate", "serve", "report", "doctor"],
)
def test_every_command_has_help(command: Command, name: str) -> None:
    answer = command(*name.split(), "--help")
    assert answer.code == 0
    assert "Usage:" in answer.out


def test_what_is_not_there_is_told_in_a_line(
    command: Command, packed: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = command("generate", packed, "--engine", "transformers", "--head", "stored")
    assert_one_line(answer, "--head is of the native engine, and this is transformers")
    answer = command("bench", "train", "--preset", "tiny", "--sharding", "fsdp2", "--device", "cpu")
    assert_one_line(answer, "--sharding fsdp2 needs several processes and there is one")
    if not torch.cuda.is_available():
        monkeypatch.setenv("SPARSE_BITNET_BACKEND", "gpu_triton")
        answer = command("eval", "ppl", packed, "--text", corpus_file, "--window", "64")
        assert_one_line(answer, "SPARSE_BITNET_BACKEND=gpu_triton: no backend can run packed_linear: gpu_triton:")


def test_help_answers_in_0_3_seconds() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "sparse_bitnet", "--help"], check=True, capture_output=True)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.3


def test_init_writes_settings_that_train_reads_and_does_not_overwrite(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    assert command("init", file).code == 0
    assert "pattern: 6:8" in file.read_text()
    file.write_text("mine")
    assert_one_line(command("init", file), "exists already: choose another name, or pass --force")
    assert file.read_text() == "mine"
    assert command("init", file, "--force").code == 0
    dry = command("train", file, "training.steps=7", "--dry-run")
    assert dry.code == 0
    assert "steps: 7" in dry.out
    assert "1,572,864 in sparse ternary layers" in dry.out


def test_a_dry_run_counts_the_layers_of_a_latent_checkpoint(command: Command, latent: Path, tmp_path: Path) -> None:
    command("init", tmp_path / "train.yaml")
    answer = command("train", tmp_path / "train.yaml", f"model.source={latent}", "--dry-run")
    assert "73,728 in sparse ternary layers" in answer.out
    assert not (tmp_path / "runs").exists()


def test_convert_packs_the_codes_of_the_latent_checkpoint(command: Command, latent: Path, tmp_path: Path) -> None:
    before = dict(named_layers(AutoModelForCausalLM.from_pretrained(latent)))
    figures = tmp_path / "figures.json"
    answer = command("convert", latent, tmp_path / "packed", "--json", figures, "--dtype", "bfloat16")
    assert answer.code == 0
    assert "2.00 bits" in answer.out
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for name, layer in named_layers(opened):
        codes, scale = before[name].quantize_weight()
        assert torch.equal(layer.codes(), codes)
        assert torch.equal(layer.weight_scale, scale.half().float())
    assert opened.dtype == torch.bfloat16
    assert json.loads(figures.read_text())["bits"] == 2.0
    assert (tmp_path / "packed" / "tokenizer.json").exists()


def test_convert_refuses_and_leaves_nothing(command: Command, latent: Path, packed: Path, tmp_path: Path) -> None:
    assert_one_line(command("convert", latent, packed), "exists already")
    assert_one_line(command("convert", packed, tmp_path / "x"), "is packed already")
    assert_one_line(command("convert", latent, tmp_path / "x", "--format", "i3"), "format 'i3' is unknown")
    assert_one_line(command("convert", latent, tmp_path / "x", "--dtype", "int8"), "--dtype int8 is not one of")
    assert_one_line(command("convert", tmp_path / "nothing", tmp_path / "x"), "no such directory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latent", "packed"]


def test_convert_tells_how_a_dense_model_comes_to_be_packed(command: Command, dense: Path, tmp_path: Path) -> None:
    told = f"has no ternary layers to pack: `sparse-bitnet import {dense} DIRECTORY` makes a model of it that has"
    assert_one_line(command("convert", dense, tmp_path / "x"), told)


def test_inspect_prints_a_row_a_layer_and_verifies_the_pattern(command: Command, packed: Path, tmp_path: Path) -> None:
    answer = command("inspect", packed, "--json", tmp_path / "figures.json")
    assert answer.code == 0
    assert answer.out.count(" ok") == 14
    assert "n:m holds everywhere" in answer.out
    assert len(json.loads((tmp_path / "figures.json").read_text())["layers"]) == 14


def test_inspect_tells_of_a_violated_pattern(command: Command, packed: Path) -> None:
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][5] = i2.pack(torch.ones(1, 64, dtype=torch.int8))
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    answer = command("inspect", packed)
    assert answer.code == 1
    assert answer.out.count("VIOLATED") == 2
    assert next(line for line in answer.out.splitlines() if line.endswith("VIOLATED")).startswith(
        name.removesuffix(".weight")
    )


def test_eval_ppl_agrees_between_latent_and_packed(
    command: Command, latent: Path, packed: Path, short_text: Path, tmp_path: Path
) -> None:
    results = {}
    for directory in (latent, packed):
        file = tmp_path / "ppl.json"
        answer = command("eval", "ppl", directory, "--text", short_text, "--json", file)
        assert answer.code == 0
        assert "non-overlapping windows of 128 tokens" in answer.out
        results[directory] = json.loads(file.read_text())
    assert results[packed]["perplexity"] == pytest.approx(results[latent]["perplexity"], rel=1e-3)


def test_eval_ppl_reads_a_dense_model_too(command: Command, dense: Path, short_text: Path) -> None:
    assert command("eval", "ppl", dense, "--text", short_text, "--window", 64).code == 0


def test_generate_is_the_same_for_the_same_seed(command: Command, packed: Path) -> None:
    first, again, other = (
        command("generate", packed, "--prompt", "the cat", "--max-new-tokens", 20, "--seed", seed) for seed in (1, 1, 2)
    )
    assert first.code == 0
    assert first.out.startswith("the cat")
    assert first.out == again.out != other.out


def need_native_kernels() -> None:
    reason = OPERATOR.obstacle(NATIVE)
    if reason is not None:
        pytest.skip(f"the native kernels are not built: {reason}")


def test_generate_takes_the_native_engine_and_writes_what_transformers_writes(
    command: Command, packed: Path, latent: Path
) -> None:
    need_native_kernels()
    options = ["--prompt", "the cat sat", "--max-new-tokens", 40, "--temperature", 0, "--device", "cpu"]
    auto = command("generate", packed, *options)
    native = command("generate", packed, "--engine", "native", "--head", "stored", *options)
    transformers = command("generate", packed, "--engine", "transformers", *options)
    assert auto.err == native.err == transformers.err == ""
    assert native.out == transformers.out
    assert auto.out.startswith("the cat sat")
    other = command("generate", latent, *options)
    assert other.code == 0
    assert other.err == (
        "transformers writes, not the native engine: the checkpoint is latent: `sparse-bitnet convert` packs it\n"
    )


def test_generate_takes_an_int8_head_unless_told_otherwise(
    command: Command, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_native_kernels()
    from sparse_bitnet.engine.decoder import Decoder

    heads = []
    build = Decoder._build
    monkeypatch.setattr(Decoder, "_build", lambda self, head: heads.append(head) or build(self, head))
    for options in ([], ["--head", "stored"], ["--engine", "transformers"]):
        assert command("generate", packed, "--max-new-tokens", 2, "--device", "cpu", *options).code == 0
    assert heads == ["int8", "stored"]
    unknown = command("generate", packed, "--head", "int3", "--device", "cpu")
    assert_one_line(unknown, "head='int3' is none of int8, stored")


def test_generate_ends_where_the_text_ends(command: Command, packed: Path) -> None:
    need_native_kernels()
    config = packed / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": list(range(320))}))
    options = ["--prompt", "the cat", "--temperature", 0, "--device", "cpu"]
    short = [command("generate", packed, "--engine", engine, *options).out for engine in ("native", "transformers")]
    assert short[0] == short[1]


@pytest.mark.parametrize("options", [["--temperature", "0"], ["--prompt", ""], ["--top-k", "0", "--top-p", "0.9"]])
def test_generate_with_other_options(command: Command, packed: Path, options: list[str]) -> None:
    assert command("generate", packed, "--max-new-tokens", 3, *options).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{packed}", "--max-new-tokens", "200"], "exceed the model's context of 128"),
        (["generate", "{packed}", "--device", "tpu"], "--device tpu"),
        (["generate", "nothing/at/all"], "no such directory"),
        (["generate", "{packed}", "--engine", "steam"], "--engine steam: choose from auto, native, transformers"),
        (
            ["generate", "{latent}", "--engine", "native", "--device", "cpu"],
            "--engine native: the checkpoint is latent",
        ),
        (["generate", "{packed}", "--top-p", "0"], "top_p=0.0 must lie above 0"),
        (["eval", "ppl", "{packed}", "--text", "nothing.txt"], "nothing.txt: no such file"),
        (["eval", "ppl", "{packed}", "--text", "{packed}/config.json"], "has no field 'text'"),
        (["inspect", "{tmp}"], "config.json is missing"),
        (["inspect", "{packed}", "--json", "{tmp}"], "is a directory: name a file"),
        (["inspect", "{packed}", "--json", "{tmp}/no/where.json"], "no is no directory that may be written to"),
        (["import", "{packed}", "{tmp}/x"], "give it to `generate`, `serve`, `export` or `eval`"),
        (["import", "{latent}", "{tmp}/x"], "give it to `train`, `convert` or `eval`"),
        (["bench", "train", "--preset", "nope", "--device", "cpu"], "preset 'nope' is unknown: choose from tiny,"),
        (["train", "nothing.yaml"], "nothing.yaml: no such file"),
        (["train", "nothing.yaml", "training.stepz=1"], "nothing.yaml: no such file"),
    ],
)
def test_a_mistake_is_one_line(
    command: Command, packed: Path, latent: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    paths = {"packed": packed, "latent": latent, "tmp": tmp_path}
    assert_one_line(command(*(part.format(**paths) for part in arguments)), message)


def test_a_truncated_checkpoint_is_one_line(command: Command, packed: Path, short_text: Path) -> None:
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for arguments in (["inspect", packed], ["generate", packed], ["eval", "ppl", packed, "--text", short_text]):
        assert_one_line(command(*arguments), "model.safetensors cannot be read")


def test_an_empty_text_is_one_line(command: Command, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert_one_line(command("eval", "ppl", packed, "--text", tmp_path / "empty.txt"), "the text has 0 tokens")


def test_doctor_tells_versions_and_kernels(command: Command, tmp_path: Path) -> None:
    answer = command("doctor", "--json", tmp_path / "doctor.json")
    assert answer.code == 0
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["environment"]["torch"] == torch.__version__
    assert report["kernels"]["packed_linear/reference"] == "works"
    assert all(kernel in answer.out for kernel in report["kernels"])


def test_a_forced_backend_that_is_unknown_is_one_line(
    command: Command, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_BITNET_BACKEND", "abacus")
    assert_one_line(
        command("generate", packed, "--max-new-tokens", 2), "SPARSE_BITNET_BACKEND=abacus: packed_linear has no"
    )


def test_the_demo_learns_python_and_packs_without_loss(command: Command, tmp_path: Path) -> None:
    """The demo as the README has it, but for a third of its steps: the figures told there are a result file's."""
    figures = tmp_path / "figures.json"
    answer = command("demo", tmp_path / "demo", "--steps", 130, "--json", figures)
    assert answer.code == 0
    seen = json.loads(figures.read_text())["figures"]
    assert seen["perplexity_unigram"] > 350
    assert seen["perplexity_latent"] < 90
    assert seen["perplexity_packed"] == pytest.approx(seen["perplexity_latent"], rel=1e-3)
    assert seen["holds_pattern"]
    assert seen["bits_per_weight"] == 2.0
    assert seen["bytes_packed"] < seen["bytes_bf16"] < seen["bytes_latent"]
    assert seen["flip_rate_last"] < seen["flip_rate_first"]
    assert 0.25 < seen["zeros"] < 0.6
    assert "perplexity, packed" in answer.out


def test_the_demo_does_not_replace_what_is_not_its_own(command: Command, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    assert_one_line(command("demo", tmp_path), "holds thesis.txt, which is not of a demo")
    assert (tmp_path / "thesis.txt").read_text() == "irreplaceable"
