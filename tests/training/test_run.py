"""Whole runs with the Trainer: what they leave behind, and that neither a stop nor a kill nor a full disk loses it."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparse_bitnet import SparseBitLinear, convert
from sparse_bitnet.corpus.tokenizer import load_tokenizer
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.training.callback import TrainingDiverged
from sparse_bitnet.training.config import TrainConfig
from sparse_bitnet.training.run import train
from sparse_bitnet.training.trainer import checkpoints, newest_checkpoint, remove_old_checkpoints

Settings = Callable[..., TrainConfig]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def run_in_process(config: TrainConfig, file: Path, before: str = "") -> subprocess.Popen[str]:
    """Train in a process of its own, after the statements `before`; `--resume auto`."""
    file.write_text(config.to_yaml())
    code = (
        f"import os, signal\nfrom pathlib import Path\n{before}\n"
        f"from sparse_bitnet.training.config import load_config\nfrom sparse_bitnet.training.run import train\n"
        f"train(load_config(Path({str(file)!r}), []), resume='auto')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_mixture_trains_and_goes_on_bit_for_bit(
    settings: Settings, mixture_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    mixture_model().save_pretrained(tmp_path / "mixture")
    source = [f"model.source={tmp_path / 'mixture'}", f"tokenizer.source={tmp_path / 'dense'}"]
    whole = train(settings(*source, "schedule.kind=dense-to-sparse", f"output_dir={tmp_path / 'whole'}"))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["pattern"] == "8:8" and lines[-1]["pattern"] == "6:8"
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert 0.25 <= lines[-1]["layers"][name]["zeros"] < 0.5 and lines[-1]["layers"][name]["flip_rate"] is not None
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-8")
    resumed = train(
        settings(*source, "schedule.kind=dense-to-sparse", f"output_dir={tmp_path / 'stopped'}"), resume="auto"
    )
    assert_equal(weights(whole.model_directory), weights(resumed.model_directory))


def test_a_run_leaves_a_trainable_checkpoint_its_settings_and_its_metrics(settings: Settings) -> None:
    config = settings("training.steps=40")
    result = train(config)
    root = Path(config.output_dir)
    assert result.steps == 40
    model = AutoModelForCausalLM.from_pretrained(result.model_directory)
    layers = list(named_layers(model))
    assert len(layers) == 14
    assert all(isinstance(layer, SparseBitLinear) and layer.weight.dtype == torch.float32 for _, layer in layers)
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert {"flip_rate", "zeros", "zeros_natural", "zeros_masked", "polarisation", "pattern"} <= set(lines[-1])
    assert set(lines[-1]["layers"]) == {name for name, _ in layers}
    assert sum(line["flip_rate"] for line in lines) > 0
    assert {path.name for path in root.iterdir()} == {
        "checkpoint-38", "checkpoint-40", "config.yaml", "env.json", "histograms.jsonl", "metrics.jsonl", "model",
        "tokenizer", "tokens",
    }  # fmt: skip
    assert {path.name for path in result.model_directory.iterdir()} >= {"config.json", "tokenizer.json"}
    assert not (result.model_directory / "training_args.bin").exists()


def test_masked_weights_learn_too(settings: Settings, dense_directory: Path) -> None:
    config = settings("recipe.pattern=2:4", "training.weight_decay=0")
    before = weights(dense_directory)
    after = weights(train(config).model_directory)
    name = "model.layers.0.mlp.up_proj.weight"
    assert float((before[name] != after[name]).double().mean()) > 0.99


@pytest.fixture
def decays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The weight decay of every optimizer step to come."""
    used: list[float] = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        used.append(max(group["weight_decay"] for group in self.param_groups))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    return used


def test_the_schedule_and_the_weight_decay_follow_the_steps(settings: Settings, decays: list[float]) -> None:
    result = train(settings("schedule.kind=dense-to-sparse", "schedule.at=0.5"))
    assert [event["pattern"] for event in result.log if "pattern" in event] == ["8:8"] * 4 + ["6:8"] * 4
    assert decays == pytest.approx([0.1, 0.075, 0.05, 0.025, 0, 0, 0, 0])


def test_full_precision_keeps_its_weight_decay(settings: Settings, decays: list[float]) -> None:
    train(settings("recipe.values=full", "recipe.activations=none"))
    assert decays == [0.1] * 8


def test_validation_is_scored(settings: Settings, corpus_file: Path) -> None:
    result = train(settings(f"data.validation_files=[{corpus_file}]", "training.eval_every=4"))
    assert [event["step"] for event in result.log if "eval_loss" in event] == [4, 8]


def test_streamed_training_sees_the_same_blocks(settings: Settings) -> None:
    assert train(settings("data.streaming=true")).steps == 8


def test_gradient_checkpointing_and_accumulation_give_the_same_first_loss(settings: Settings, tmp_path: Path) -> None:
    first = {}
    for name, overrides in {
        "plain": ["training.batch_size=8"],
        "checkpointed": ["training.batch_size=8", "training.gradient_checkpointing=true"],
        "accumulated": ["training.batch_size=4", "training.gradient_accumulation=2"],
    }.items():
        config = settings(*overrides, "training.steps=1", f"output_dir={tmp_path / name}")
        first[name] = next(event["loss"] for event in train(config).log if "loss" in event)
    assert first["checkpointed"] == pytest.approx(first["plain"], rel=1e-5)
    assert first["accumulated"] == pytest.approx(first["plain"], rel=1e-5)


def test_bf16_arithmetic_leaves_fp32_masters(settings: Settings) -> None:
    result = train(settings("training.precision=bf16", "training.steps=40"))
    losses = [event["loss"] for event in result.log if "loss" in event]
    assert losses[-1] < losses[0] - 0.5
    assert {tensor.dtype for tensor in weights(result.model_directory).values()} == {torch.float32}


def test_training_goes_on_from_a_latent_checkpoint_with_another_pattern(settings: Settings, tmp_path: Path) -> None:
    first = train(settings())
    onward = settings(f"model.source={first.model_directory}", f"output_dir={tmp_path / 'on'}", "recipe.pattern=2:4")
    model = AutoModelForCausalLM.from_pretrained(train(onward).model_directory)
    assert {str(layer.recipe.pattern) for _, layer in named_layers(model)} == {"2:4"}


def test_another_recipe_on_a_latent_checkpoint_is_refused(settings: Settings, tmp_path: Path) -> None:
    first = train(settings("training.steps=2"))
    with pytest.raises(ValueError, match="of a recipe only the pattern can change"):
        train(settings(f"model.source={first.model_directory}", f"output_dir={tmp_path / 'on'}", "recipe.values=sign"))


def test_a_packed_checkpoint_is_not_trainable(
    settings: Settings, latent_model: Callable[..., PreTrainedModel], dense_directory: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    convert(latent_model()).save_pretrained(packed)
    overrides = (f"model.source={packed}", f"tokenizer.source={dense_directory}")
    with pytest.raises(ValueError, match="is packed and cannot be trained: give the latent checkpoint"):
        train(settings(*overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.files=[]", "give either files or a dataset"),
        ("data.files=[nothing.txt]", "nothing.txt: no such file"),
        ("data.validation_files=[nothing.txt]", "nothing.txt: no such file"),
        ("training.block_size=4096", "training.block_size=4096 is beyond the model's context of 128"),
        ("recipe.pattern=6:7", "in_features=64 is not a multiple of m=7 (model.layers.0.self_attn.q_proj"),
        ("model.source=nothing", "no tokenizer could be read from nothing"),
        ("model.source=/no/thing", "no tokenizer could be read from /no/thing: no such file or directory"),
        ("recipe.targets=[nothing]", "'nothing' matches no layer"),
    ],
)
@pytest.mark.filterwarnings("default")
def test_what_does_not_fit_is_told_before_training(
    settings: Settings, override: str, message: str, recwarn: pytest.WarningsRecorder
) -> None:
    try:
        train(settings(override, "training.steps=1"))
        told = " ".join(str(warning.message) for warning in recwarn)
    except ValueError as refusal:
        told = str(refusal)
    assert message in told


def test_a_run_is_not_begun_over_another(settings: Settings) -> None:
    train(settings("training.steps=2"))
    with pytest.raises(ValueError, match=r"holds a run already: go on with --resume auto"):
        train(settings("training.steps=2"))


def test_a_run_that_begins_anew_does_not_take_the_tokenizer_that_it_finds(settings: Settings, tmp_path: Path) -> None:
    overrides = ("model.source=tiny", "training.steps=1")
    config = settings(*overrides, "tokenizer.vocab_size=270", "training.block_size=4096")
    with pytest.raises(ValueError, match="beyond the model's context"):
        train(config)  # has trained a tokenizer before it stops
    assert (tmp_path / "run" / "tokenizer").exists()
    model = train(settings(*overrides, "tokenizer.vocab_size=280")).model_directory
    assert len(load_tokenizer(str(model))) == 280


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    settings: Settings, tmp_path: Path, streaming: str
) -> None:
    """Schedule, decay, data order and optimizer all go on; the metrics have each step once."""
    schedule = ("schedule.kind=gradual", "schedule.patterns=['8:8', '7:8', '6:8']")
    overrides = (*schedule, "training.keep_checkpoints=9", f"data.streaming={streaming}")
    whole = train(settings(*overrides, f"output_dir={tmp_path / 'whole'}"))
    config = settings(*overrides)
    train(config)
    root = Path(config.output_dir)
    for checkpoint in checkpoints(root)[1:]:
        checkpoint.rename(tmp_path / checkpoint.name)
    resumed = train(config, resume="auto")
    assert_equal(weights(whole.model_directory), weights(resumed.model_directory))
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    moments = [json.loads(line)["step"] for line in (root / "histograms.jsonl").read_text().splitlines()]
    assert moments == list(range(9))
    elsewhere = settings(*overrides, f"output_dir={tmp_path / 'again'}")
    again = train(elsewhere, resume=str(tmp_path / "checkpoint-6"))
    assert_equal(weights(whole.model_directory), weights(again.model_directory))


def test_what_is_changed_on_a_resume_counts_from_there_on(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings("training.steps=4"))
    changed = ("training.learning_rate=1e-4", "training.betas=[0.5, 0.6]", "training.weight_decay=0.3")
    resumed = train(settings("training.steps=6", *changed, "recipe.pattern=2:4"), resume="auto")
    told = capsys.readouterr().out
    for line in (
        "training.learning_rate=0.0001 (was 0.003)",
        "training.steps=6 (was 4)",
        "recipe.pattern=2:4 (was 6:8)",
    ):
        assert line in told
    whole = train(settings("training.steps=6", *changed, f"output_dir={tmp_path / 'whole'}"))
    rates = [
        {event["step"]: event["learning_rate"] for event in run.log if "loss" in event} for run in (resumed, whole)
    ]
    assert [rates[0][step] for step in (5, 6)] == [rates[1][step] for step in (5, 6)]
    assert rates[0][3] > 9 * rates[1][3]
    state = torch.load(tmp_path / "run" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert {group["betas"] for group in state["param_groups"]} == {(0.5, 0.6)}
    assert {group["initial_weight_decay"] for group in state["param_groups"]} == {0.3, 0.0}
    assert resumed.steps == 6


def test_a_resume_from_before_checkpoints_that_stand_is_refused_and_leaves_them(
    settings: Settings, tmp_path: Path
) -> None:
    """The run would remove its own checkpoints, as those have later steps, and `auto` go on from those."""
    root = tmp_path / "run"
    train(settings("training.steps=6", "training.keep_checkpoints=3"))
    files = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    changed = settings("training.steps=6", "training.keep_checkpoints=1", "training.learning_rate=1e-2")
    with pytest.raises(ValueError, match=r"later checkpoints than .*-2, checkpoint-4, checkpoint-6: move or delete"):
        train(changed, resume=str(root / "checkpoint-2"))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == files
    for name in ("checkpoint-4", "checkpoint-6"):
        (root / name).rename(tmp_path / name)
    assert train(changed, resume=str(root / "checkpoint-2")).steps == 6
    assert [checkpoint.name for checkpoint in checkpoints(root)] == ["checkpoint-6"]


def test_a_resume_keeps_the_token_ids_of_its_checkpoint(settings: Settings, corpus_file: Path, tmp_path: Path) -> None:
    """Also into another output_dir and with another text, on which another tokenizer would be trained."""
    small = ("model.source=tiny", "tokenizer.vocab_size=300", "training.save_every=1")
    first = train(settings(*small, "training.steps=2"))
    ids = load_tokenizer(str(first.model_directory)).get_vocab()
    other_text = tmp_path / "other.txt"
    other_text.write_text(corpus_file.read_text()[::-1])
    more = (*small, "training.steps=3", f"data.files=[{other_text}]")
    for name, tokenizer_inside in {"inside": True, "beside": False}.items():
        checkpoint = tmp_path / "run" / "checkpoint-2"
        if not tokenizer_inside:
            for file in checkpoint.glob("tokenizer*"):
                file.unlink()
        onward = settings(*more, f"output_dir={tmp_path / name}")
        model = train(onward, resume=str(checkpoint)).model_directory
        assert load_tokenizer(str(model)).get_vocab() == ids
        assert load_tokenizer(str(tmp_path / name / "tokenizer")).get_vocab() == ids
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    with pytest.raises(ValueError, match=r"checkpoint-2 holds no tokenizer, and .*tokenizer is missing: copy"):
        train(settings(*more, f"output_dir={tmp_path / 'none'}"), resume=str(checkpoint))


def test_a_resume_prepares_no_text_anew(settings: Settings, tmp_path: Path) -> None:
    small = ("model.source=tiny", "tokenizer.vocab_size=300")
    train(settings(*small, "training.steps=2"))
    train(settings(*small, "training.steps=3"), resume="auto")
    assert len(list((tmp_path / "run" / "tokens").iterdir())) == 1


def test_what_a_checkpoint_has_settled_cannot_be_changed(settings: Settings, tmp_path: Path) -> None:
    train(settings("training.steps=2"))
    before = (tmp_path / "run" / "config.yaml").read_text()
    for override in ("model.source=tiny", "tokenizer.vocab_size=300", "recipe.values=sign"):
        with pytest.raises(ValueError, match=rf"{override} cannot be set on a resume, as the run began with"):
            train(settings("training.steps=4", override), resume="auto")
        assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_run_that_is_over_says_what_it_does_not_apply(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    train(settings("training.steps=2"))
    train(settings("training.steps=2", "recipe.pattern=2:4"), resume="auto")
    assert "2 steps are done; not applied: recipe.pattern=2:4 (was 6:8)" in capsys.readouterr().out


def test_a_logger_that_is_not_installed_is_told(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match=r"training.report_to=\['wandb'\]: .*installed"):
        train(settings("training.report_to=[wandb]"))


def test_a_run_that_had_done_all_its_steps_makes_none_more(settings: Settings) -> None:
    """Also where it was killed after its last checkpoint and before it wrote the model."""
    config = settings("training.steps=4")
    first = train(config)
    names, whole = {path.name for path in first.model_directory.iterdir()}, weights(first.model_directory)
    shutil.rmtree(first.model_directory)
    again = train(config, resume="auto")
    assert (again.steps, again.stopped_by) == (4, None)
    assert [event["step"] for event in again.log if "loss" in event] == [1, 2, 3, 4]
    assert {path.name for path in again.model_directory.iterdir()} == names
    assert_equal(whole, weights(again.model_directory))


KILLED_WHILE_IT_GROWS = """
import transformers
save = transformers.Trainer._save_optimizer_and_scheduler
def killed(self, output):
    if "checkpoint-6" in output: os.kill(os.getpid(), signal.SIGKILL)
    save(self, output)
transformers.Trainer._save_optimizer_and_scheduler = killed
"""
KILLED_BEFORE_IT_HAS_ITS_NAME = """
import sparse_bitnet.training.trainer as trainer
publish = trainer.publish_directory
def killed(staging, target):
    if staging.name == "checkpoint-6": os.kill(os.getpid(), signal.SIGKILL)
    publish(staging, target)
trainer.publish_directory = killed
"""


@pytest.mark.parametrize("killed", [KILLED_WHILE_IT_GROWS, KILLED_BEFORE_IT_HAS_ITS_NAME], ids=["growing", "nameless"])
def test_a_kill_in_the_middle_of_a_save_keeps_the_checkpoint_before(
    settings: Settings, tmp_path: Path, killed: str
) -> None:
    whole = train(settings(f"output_dir={tmp_path / 'whole'}"))
    config = settings("training.keep_checkpoints=1")
    root = Path(config.output_dir)
    process = run_in_process(config, tmp_path / "config.yaml", killed)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    assert [checkpoint.name for checkpoint in checkpoints(root)] == ["checkpoint-4"]
    assert (root / ".incomplete" / "checkpoint-6").exists()
    resumed = train(config, resume="auto")
    assert_equal(weights(whole.model_directory), weights(resumed.model_directory))
    assert not (root / ".incomplete").exists()


def test_kills_at_any_moment_lose_only_the_steps_since_the_last_checkpoint(settings: Settings, tmp_path: Path) -> None:
    steps = "training.steps=60"
    whole = train(settings(steps, f"output_dir={tmp_path / 'whole'}"))
    config, chance = settings(steps), random.Random(0)
    root, reached = Path(config.output_dir), [0]
    for _ in range(3):
        process = run_in_process(config, tmp_path / "config.yaml")
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            newest, _ = newest_checkpoint(root)
            if newest is not None and int(newest.name.rpartition("-")[2]) > reached[-1]:
                break
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.3))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        newest, refusals = newest_checkpoint(root)
        assert newest is not None
        assert refusals == []
        reached.append(int(newest.name.rpartition("-")[2]))
    assert reached == sorted(reached)
    assert_equal(weights(whole.model_directory), weights(train(config, resume="auto").model_directory))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "config.json"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(
    settings: Settings, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings("training.steps=4")
    whole = weights(train(config).model_directory)
    file = Path(config.output_dir) / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[:10])
    assert_equal(whole, weights(train(config, resume="auto").model_directory))
    printed = capsys.readouterr().out
    assert f"passed over: {file}" in printed
    assert "resuming from" in printed
    assert "checkpoint-2" in printed


def test_a_new_checkpoint_outlives_a_damaged_later_one(tmp_path: Path) -> None:
    for step in (2, 4, 6):  # a run went to 6, was resumed from 2 as 4 and 6 are damaged, and has saved 4 again
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_old_checkpoints(tmp_path, 1, 4)
    assert [checkpoint.name for checkpoint in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    remove_old_checkpoints(tmp_path, None, 6)
    assert len(checkpoints(tmp_path)) == 2


@pytest.mark.parametrize(
    ("value", "bad_step", "told_step"), [("inf", 5, 6), ("nan", 5, 6), ("nan", 6, 6), ("inf", 8, 8)]
)
def test_training_that_diverges_stops_with_step_and_layer_and_keeps_the_checkpoint(
    settings: Settings, value: str, bad_step: int, told_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 6 and 8 would be saved: the weights that the optimizer has just spoilt must not be."""
    config = settings()
    step, steps = torch.optim.AdamW.step, itertools.count(1)

    def spoil(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        result = step(self, *args, **kwargs)
        if next(steps) == bad_step:
            with torch.no_grad():
                self.param_groups[0]["params"][3][0, 0] = float(value)
        return result

    config = config.model_copy(update={"training": config.training.model_copy(update={"log_every": 100})})
    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(TrainingDiverged, match=rf"step {told_step}: .*model\.layers\.0\.self_attn\.\w+") as stop:
        train(config)
    assert "The last checkpoint stands" in str(stop.value)
    saved = checkpoints(Path(config.output_dir))
    assert saved[-1].name == f"checkpoint-{(told_step - 1) // 2 * 2}"
    assert all(bool(tensor.isfinite().all()) for tensor in weights(saved[-1]).values())


def test_a_full_disk_stops_training_and_keeps_the_checkpoint_before(
    settings: Settings, mount: Callable[[str], Path]
) -> None:
    small_disk = mount("2m")  # holds one checkpoint and a half
    config = settings(f"output_dir={small_disk / 'run'}")
    with pytest.raises(OSError, match=r"checkpoint-4 could not be saved .*: the checkpoints before it stand"):
        train(config)
    newest, _ = newest_checkpoint(small_disk / "run")
    assert newest is not None
    assert newest.name == "checkpoint-2"
    assert not (small_disk / "run" / ".incomplete").exists()
