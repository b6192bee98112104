"""Two processes against one: the same tokens give the same training, checkpoints pass between them, faults end both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparse_bitnet.cli.main import main
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.training.config import TrainConfig
from sparse_bitnet.training.preemption import StopOnSignal
from sparse_bitnet.training.run import train
from sparse_bitnet.training.trainer import checkpoints, newest_checkpoint

Settings = Callable[..., TrainConfig]

TASKS = Path(__file__).with_name("on_two_processes.py")
# Sums over the batch are taken in another order, which changes a weight by 1e-7 of itself, and now and then thereby
# the code of a weight or the integer of an activation; 1e-4 of the loss is seen, 1e-3 leaves room for other machines.
SAME_LOSS = 1e-3


def launch(*command: object) -> subprocess.Popen[str]:
    """Start two processes with torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*torchrun, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [event["loss"] for event in log if "loss" in event]


def same_loss(one: list[float]) -> Any:
    return pytest.approx(one, rel=SAME_LOSS)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def differing_tensors(one: Path, other: Path) -> list[str]:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.fixture
def written(settings: Settings, tmp_path: Path, corpus_file: Path) -> Callable[..., TrainConfig]:
    """Settings for two processes in `config.yaml`: half the batch of `settings`, a tokenizer trained anew."""

    def write(*overrides: str) -> TrainConfig:
        config = settings(
            "training.batch_size=2", "tokenizer.source=train", "tokenizer.vocab_size=320",
            "training.keep_checkpoints=9", f"data.validation_files=[{corpus_file}]", "training.eval_blocks=8",
            *overrides,
        )  # fmt: skip
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        (tmp_path / "empty.txt").touch()
        return config

    return write


def with_whole_batch(config: TrainConfig, output: Path, **training: Any) -> TrainConfig:
    """The same run on one process."""
    whole = config.training.model_copy(update={"batch_size": 2 * config.training.batch_size, **training})
    return config.model_copy(update={"output_dir": str(output), "training": whole})


def test_two_processes_train_as_one(written: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = written("training.eval_every=8")
    one = train(with_whole_batch(config, tmp_path / "one"))
    process = launch(TASKS, "together", tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    first, second = (json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1))

    alone = losses(one.log)
    for name in ("ddp", "streamed", "fsdp2", "bf16"):
        assert first[name]["steps"] == second[name]["steps"] == 8
    assert first["ddp"]["losses"] == second["ddp"]["losses"] == same_loss(alone)
    assert first["fsdp2"]["losses"] == same_loss(alone)
    assert first["fsdp2"]["evaluated"] == same_loss([event["eval_loss"] for event in one.log if "eval_loss" in event])
    streamed = train(with_whole_batch(config, tmp_path / "stream-one").model_copy(
        update={"data": config.data.model_copy(update={"streaming": True})}
    ))  # fmt: skip
    assert first["streamed"]["losses"] == same_loss(losses(streamed.log))
    assert losses(streamed.log) != same_loss(alone)
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16" / "model").values()} == {torch.float32}

    # a checkpoint passes from one process to two, and from two, split or not, to one
    assert first["resumed"]["losses"][-4:] == same_loss(alone[4:])
    for name in ("ddp", "fsdp2"):
        files = {path.name for path in (tmp_path / name / "checkpoint-4").iterdir()}
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"} <= files
        resumed = train(with_whole_batch(config, tmp_path / f"{name}-one"), str(tmp_path / name / "checkpoint-4"))
        assert losses(resumed.log)[-4:] == same_loss(alone[4:])
    assert "tokens a step were" not in capfd.readouterr().out
    train(config.model_copy(update={"output_dir": str(tmp_path / "half")}), str(tmp_path / "ddp" / "checkpoint-6"))
    assert "tokens a step were 128 and are 64" in capfd.readouterr().out

    # SIGTERM to the second process alone stops both after the same step; going on is as if it had not come
    for seen in (first, second):
        assert (seen["stopped"]["steps"], seen["stopped"]["complete"], seen["exported_when_stopped"]) == (
            3,
            False,
            False,
        )
    assert differing_tensors(tmp_path / "stopped" / "model", tmp_path / "fsdp2" / "model") == []

    # what fails on one is told there, and ends the other
    assert "TrainingDiverged: step 3: the loss is nan; every layer is finite" in first["diverged"]
    assert second["diverged"] == "OtherProcessFailed: 2"
    assert "holds a run already" in first["refused"]
    assert "ValueError: the corpus is empty" in first["failed_on_first"]
    assert second["refused"] == second["failed_on_first"] == "OtherProcessFailed: 2"
    assert (first["order"], second["order"]) == ([], ["order-0"])

    # the layers of a split model, and what is exported of it
    for layers in (first["layers"], second["layers"]):
        assert layers["share"] == layers["all"] / 2
        assert layers["codes_outside"] and layers["codes_before"] and layers["readings_before"]
        assert layers["codes_after"] and layers["readings_after"] and len(layers["moved"]) == 14
        assert [loss for _, loss in layers["losses"]] == same_loss([loss for loss, _ in layers["losses"]])
        assert layers["non_finite"] == ["model.layers.0.mlp.up_proj.weight"]
    assert first["layers"]["exported"] and first["layers"]["tied"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fsdp2" / "model")
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    assert len(list(named_layers(model))) == 14


def test_a_killed_process_ends_the_other_and_training_goes_on_until_sigterm(written: Settings, tmp_path: Path) -> None:
    config = written()
    root = tmp_path / "killed"
    process = launch(TASKS, "killed_while_saving", tmp_path)
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "SIGKILL" in output
    assert [checkpoint.name for checkpoint in checkpoints(root)] == ["checkpoint-2", "checkpoint-4"]
    assert not (root / "model").exists()
    resumed = train(with_whole_batch(config, root, keep_checkpoints=1), "auto")
    assert resumed.stopped_by is None

    # the newest is damaged: both processes take the one before; torchrun passes SIGTERM on to both
    (root / "checkpoint-8" / "optimizer.pt").write_bytes(b"damaged")
    (tmp_path / "config.yaml").write_text(config.model_copy(update={"output_dir": str(root)}).to_yaml())
    process = launch(
        "-m", "sparse_bitnet", "train", tmp_path / "config.yaml", "training.steps=2000", "--resume", "auto"
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None and not (root / "checkpoint-12").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    newest, refusals = newest_checkpoint(root)
    assert newest is not None, output
    step = newest.name.rpartition("-")[2]
    assert f"passed over: {root / 'checkpoint-8' / 'optimizer.pt'}" in output
    assert output.count(f"stopped by SIGTERM after step {step} of 2000: its checkpoint is saved") == 1
    assert refusals == []


def test_a_mistake_is_told_once(written: Settings, tmp_path: Path) -> None:
    written()
    process = launch("-m", "sparse_bitnet", "train", tmp_path / "config.yaml", "training.stepz=2")
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert output.count("error: training.stepz: unknown setting") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_going_on_is_bit_for_bit(
    number: signal.Signals,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    train(settings(f"output_dir={tmp_path / 'whole'}"))
    config, before = settings(), signal.getsignal(number)
    root, file = Path(config.output_dir), tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    step, steps = torch.optim.AdamW.step, iter(range(1, 99))

    def signalled(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        if next(steps) == 5:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # at once: the same request, passed on twice
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", signalled)
    monkeypatch.setattr(sys, "argv", ["sparse-bitnet", "train", str(file)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 128 + number
    told = capfd.readouterr()
    assert f"stopped by {number.name} after step 5 of 8" in told.out
    assert ("Ctrl-C again ends at once" in told.err) == (number == signal.SIGINT)
    assert not (root / "model").exists()
    assert checkpoints(root)[-1].name == "checkpoint-5"
    assert signal.getsignal(number) == before
    assert train(config, resume="auto").stopped_by is None
    assert differing_tensors(root / "model", tmp_path / "whole" / "model") == []


@pytest.mark.parametrize(
    ("number", "default"), [(signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)]
)
def test_a_second_signal_ends_at_once(number: signal.Signals, default: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends() -> bool:
        signal.raise_signal(number)
        return signal.getsignal(number) is default

    with StopOnSignal():
        assert not ends()
        assert not ends()  # torchrun may pass on what the scheduler has sent already
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 6)
        monkeypatch.setattr(os, "kill", lambda process, number: None)
        assert ends()


def test_splitting_needs_several_processes(settings: Settings) -> None:
    with pytest.raises(
        ValueError, match=r"training.sharding=fsdp2 needs several processes and there is one: start with"
    ):
        train(settings("training.sharding=fsdp2"))
