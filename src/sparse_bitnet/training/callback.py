"""One callback for any Hugging Face Trainer, TRL's too: pattern schedule, weight decay, monitors, a halt on NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_bitnet.checkpoint.directory import write_text
from sparse_bitnet.nn.layer import LatentLayer
from sparse_bitnet.nn.sparse_forward import Shape
from sparse_bitnet.nn.step_weights import StepWeights
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.nn.swap import set_pattern
from sparse_bitnet.recipe import NMPattern, Recipe
from sparse_bitnet.training.monitors import MaskMonitor, non_finite_tensors
from sparse_bitnet.training.schedules import PatternSchedule, falling_share
from sparse_bitnet.training.sharding import whole_tensor

INITIAL_DECAY = "initial_weight_decay"
REMEDY = "The last checkpoint stands; lower the learning rate or raise the warm-up, and resume from it."


class TrainingDiverged(ValueError):
    """Loss, gradients or weights are no longer finite; the message names the step and the tensor."""


class SparseBitNetCallback(TrainerCallback):
    """Pass it in `callbacks=[...]`; the model has been through `prepare`.

    schedule            the pattern of every step; None leaves the pattern alone
    weight_decay_until  share of the steps at which the weight decay, falling in a line, has reached 0; None keeps it
    metrics_file        JSON lines, one a log event, with the readings of every layer
    sparse_shapes       picks, from the shapes [O, I] of the layers, those whose forward products run on sparse tensor
                        cores; asked once for each pattern of the schedule; None picks none

    The layers' effective weights are made once an optimizer step (see `StepWeights`). With each log event the callback
    adds `pattern`, `flip_rate`, `zeros`, `zeros_natural`, `zeros_masked` and `polarisation` (see `LayerReading`) to the
    logs and to `state.log_history`. A logger that stands before it among the callbacks, as those of `report_to` do,
    does not see them: move the callback to the front of `trainer.callback_handler.callbacks`, or use
    `sparse_bitnet.training.trainer.Trainer`, which does. Non-finite gradients stop training before the optimizer uses
    them; non-finite weights before they are saved.
    """

    def __init__(
        self,
        schedule: PatternSchedule | None = None,
        weight_decay_until: float | None = None,
        metrics_file: Path | str | None = None,
        sparse_shapes: Callable[[Collection[Shape], Recipe], Collection[Shape]] | None = None,
    ) -> None:
        self.schedule = schedule
        self.weight_decay_until = weight_decay_until
        self.metrics_file = None if metrics_file is None else Path(metrics_file)
        self.sparse_shapes = sparse_shapes
        self.monitor = MaskMonitor()
        self._step_weights: StepWeights | None = None
        self._shapes_by_pattern: dict[NMPattern, Collection[Shape]] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._set_pattern(kwargs["model"], state)
        for group in _groups(kwargs["optimizer"]):  # part of the optimizer's state, so it survives a resume
            group.setdefault(INITIAL_DECAY, group["weight_decay"])
        self.monitor.read(kwargs["model"])
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self._step_weights = StepWeights(kwargs["model"], dtype)
        self._choose_sparse_shapes(kwargs["model"], self._step_weights)
        if self.metrics_file is not None and state.is_world_process_zero:
            _drop_steps_after(self.metrics_file, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._set_pattern(kwargs["model"], state)
        if self.weight_decay_until is not None:
            share = falling_share(state.global_step, state.max_steps, self.weight_decay_until)
            for group in _groups(kwargs["optimizer"]):
                group["weight_decay"] = group[INITIAL_DECAY] * share
        if self._step_weights is not None:
            self._step_weights.refresh()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._step_weights is not None:
            self._step_weights.release()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        if not looks_for_nan(state, args.device):
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if gradients and not math.isfinite(float(whole_tensor(nn.utils.get_total_norm(gradients)))):
            bad = non_finite_tensors(model)
            where = f"{bad[0]} holds NaN or infinity" if bad else "the weights are still finite"
            raise TrainingDiverged(f"step {state.global_step + 1}: the gradients are not finite; {where}. {REMEDY}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save or control.should_log or state.global_step == state.max_steps:
            bad = non_finite_tensors(kwargs["model"])
            if bad:
                raise TrainingDiverged(f"step {state.global_step}: {bad[0]} holds NaN or infinity. {REMEDY}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise TrainingDiverged(f"step {state.global_step}: the loss is {logs['loss']}. {REMEDY}")
        overall, layers = self.monitor.read(kwargs["model"])
        if overall is None:
            return
        readings: dict[str, Any] = {name: value for name, value in asdict(overall).items() if value is not None}
        readings["pattern"] = next(str(layer.recipe.pattern) for _, layer in named_layers(kwargs["model"]))
        logs.update(readings)
        if state.log_history:
            state.log_history[-1].update(readings)
        if self.metrics_file is not None and state.is_world_process_zero:
            line = {
                "step": state.global_step,
                **logs,
                "layers": {name: asdict(layer) for name, layer in layers.items()},
            }
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _set_pattern(self, model: nn.Module, state: TrainerState) -> None:
        if self.schedule is None:
            return
        wanted = self.schedule.pattern_at(min(state.global_step, state.max_steps - 1), state.max_steps)
        layers = (layer for _, layer in named_layers(model) if isinstance(layer, LatentLayer))
        if any(layer.recipe.pattern != wanted for layer in layers):
            set_pattern(model, wanted)
            if self._step_weights is not None:
                self._step_weights.sparse_shapes = self._shapes_by_pattern.get(wanted, ())

    def _choose_sparse_shapes(self, model: nn.Module, step_weights: StepWeights) -> None:
        """For each pattern that will come, now: later a measurement would find memory and streams in use."""
        recipe = next((layer.recipe for _, layer in named_layers(model)), None)
        if self.sparse_shapes is None or recipe is None:
            return
        patterns = {recipe.pattern} if self.schedule is None else {pattern for _, pattern in self.schedule.stages}
        for pattern in sorted(patterns, key=str):
            chosen = self.sparse_shapes(step_weights.shapes, replace(recipe, pattern=pattern))
            self._shapes_by_pattern[pattern] = chosen
        step_weights.sparse_shapes = self._shapes_by_pattern[recipe.pattern]


def looks_for_nan(state: TrainerState, device: torch.device) -> bool:
    """Whether this step, not yet counted, is checked: each on a CPU; on a GPU, where a look waits, those that log."""
    return device.type == "cpu" or (state.global_step + 1) % max(int(state.logging_steps), 1) == 0


def _groups(optimizer: torch.optim.Optimizer | None) -> list[dict[str, Any]]:
    return optimizer.param_groups if optimizer is not None else []


def _drop_steps_after(file: Path, step: int) -> None:
    """Keep the lines up to `step`: what came after the checkpoint is about to be done again."""
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(file, "".join(kept))
