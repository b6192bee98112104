"""The callback in a stock Hugging Face Trainer, set up as a user would."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sparse_bitnet import NMPattern, Recipe, SparseBitNetCallback, convert
from sparse_bitnet.nn.sparse_forward import Shape
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.training.callback import TrainingDiverged
from sparse_bitnet.training.schedules import ResidualSchedule, dense_to_sparse
from sparse_bitnet.training.trainer import Trainer as SparseBitNetTrainer


class Listener(TrainerCallback):
    """A logger, as TensorBoard's: it keeps the logs that it is shown."""

    def __init__(self) -> None:
        self.logs: list[dict[str, object]] = []

    def on_log(self, args: object, state: object, control: object, logs: object = None, **kwargs: object) -> None:
        self.logs.append(dict(logs or {}))


def examples() -> list[dict[str, torch.Tensor]]:
    rows = torch.arange(16 * 12).view(16, 12) % 320
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 6, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "dataloader_pin_memory": False, "disable_tqdm": True, "weight_decay": 0.2, "per_device_train_batch_size": 4,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(directory), **(settings | options))


@pytest.mark.parametrize("trainer_class", [Trainer, SparseBitNetTrainer])
def test_it_works_unchanged_in_any_trainer(
    latent_model: Callable[..., PreTrainedModel], tmp_path: Path, trainer_class: type[Trainer]
) -> None:
    callback = SparseBitNetCallback(
        dense_to_sparse(NMPattern(2, 4), 0.5),
        weight_decay_until=0.5,
        metrics_file=tmp_path / "metrics.jsonl",
        histograms_file=tmp_path / "histograms.jsonl",
    )
    trainer = trainer_class(
        model=latent_model(), args=arguments(tmp_path), train_dataset=examples(), callbacks=[callback]
    )
    trainer.train()
    logged = [event for event in trainer.state.log_history if "loss" in event]
    assert [event["pattern"] for event in logged] == ["4:4"] * 3 + ["2:4"] * 3
    assert all(0 <= event["flip_rate"] <= 1 for event in logged)
    assert logged[-1]["zeros"] >= 0.5 > logged[0]["zeros"]
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    moments = [json.loads(line) for line in (tmp_path / "histograms.jsonl").read_text().splitlines()]
    assert [(line["step"], line["pattern"]) for line in moments] == [
        (step, "2:4" if step > 3 else "4:4") for step in range(7)
    ]
    assert all(sum(layer["masked"]) == 0 for layer in moments[0]["layers"].values())
    assert all(sum(layer["masked"]) == sum(layer["kept"]) for layer in moments[-1]["layers"].values())


def test_the_checkpoint_of_a_dense_stage_says_that_it_is_dense(
    latent_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = latent_model()
    callback = SparseBitNetCallback(dense_to_sparse(NMPattern(2, 4), 0.99))
    Trainer(model=model, args=arguments(tmp_path), train_dataset=examples(), callbacks=[callback]).train()
    assert model.config.quantization_config["pattern"] == "4:4"


@pytest.mark.parametrize("options", [{"optim": "sgd"}, {"lr_scheduler_type": "reduce_lr_on_plateau"}], ids=str)
def test_our_trainer_resumes_any_optimizer_and_schedule(
    latent_model: Callable[..., PreTrainedModel], tmp_path: Path, options: dict[str, Any]
) -> None:
    if "lr_scheduler_type" in options:
        options = {**options, "eval_strategy": "steps", "eval_steps": 1}
    for steps, resumed in ((2, False), (4, True)):
        settings = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=steps, **options)
        trainer = SparseBitNetTrainer(
            model=latent_model(), args=settings, train_dataset=examples(), eval_dataset=examples(),
            callbacks=[SparseBitNetCallback()],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resumed)
        assert trainer.state.global_step == steps


def test_our_trainer_shows_the_readings_to_the_loggers(
    latent_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    listener = Listener()
    SparseBitNetTrainer(
        model=latent_model(), args=arguments(tmp_path), train_dataset=examples(),
        callbacks=[listener, SparseBitNetCallback()],
    ).train()  # fmt: skip
    assert all("flip_rate" in logs for logs in listener.logs if "loss" in logs)


def test_non_finite_gradients_stop_training_but_for_fp16_whose_scaler_waits_for_them(
    latent_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = latent_model()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)

    def look(**options: bool) -> None:
        SparseBitNetCallback().on_pre_optimizer_step(
            arguments(tmp_path, **options), TrainerState(), TrainerControl(), model=model
        )

    with pytest.raises(TrainingDiverged, match="step 1: the gradients are not finite; the weights are still finite"):
        look()
    look(fp16=True)


def test_a_dense_model_is_left_in_peace(dense_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    trainer = Trainer(
        model=dense_model(), args=arguments(tmp_path), train_dataset=examples(), callbacks=[SparseBitNetCallback()]
    )
    trainer.train()
    assert "flip_rate" not in trainer.state.log_history[0]


def test_sparse_shapes_are_chosen_once_a_pattern_and_used_in_their_stage(
    latent_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    asked: list[str] = []
    used: list[bool] = []

    def choose(shapes: Collection[Shape], recipe: Recipe) -> Collection[Shape]:
        asked.append(str(recipe.pattern))
        return set(shapes)

    class Watch(TrainerCallback):
        def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
            layers = [layer for _, layer in named_layers(kwargs["model"])]  # type: ignore[arg-type]
            used.append(all(layer.step_fragments is not None for layer in layers))  # type: ignore[union-attr]

    losses = []
    for sparse_shapes in (None, choose):
        torch.manual_seed(0)
        schedule = dense_to_sparse(NMPattern(2, 4), 0.5)
        trainer = Trainer(
            model=latent_model(),
            args=arguments(tmp_path),
            train_dataset=examples(),
            callbacks=[
                SparseBitNetCallback(schedule, sparse_shapes=sparse_shapes),
                Watch(),
            ],
        )
        trainer.train()
        losses.append([event["loss"] for event in trainer.state.log_history if "loss" in event])
    assert asked == ["2:4", "4:4"]
    assert used == [False] * 6 + [False] * 3 + [True] * 3  # a dense pattern has no form for sparse tensor cores
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_the_residual_follows_its_schedule_and_is_gone_at_the_end(
    latent_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    seen: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
            layer = next(layer for _, layer in named_layers(kwargs["model"]))  # type: ignore[arg-type]
            seen.append(0.0 if layer.residual is None else float(layer.residual))  # type: ignore[union-attr]

    for until in (0.5, 1.0):
        seen.clear()
        schedule = ResidualSchedule(peak=1.0, warmup=0.2, until=until)
        model = latent_model(Recipe("3:4", values="sign"))
        callbacks = [SparseBitNetCallback(residual=schedule), Watch()]
        Trainer(model=model, args=arguments(tmp_path), train_dataset=examples(), callbacks=callbacks).train()
        assert seen == pytest.approx([schedule.share_at(step, 6) for step in range(6)])
        convert(model)  # which refuses a residual
