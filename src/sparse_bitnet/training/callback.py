"""One callback for any Hugging Face Trainer, TRL's too: pattern schedule, weight decay, monitors, a halt on NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_bitnet.nn.sparse_forward import Shape
from sparse_bitnet.nn.step_weights import StepWeights
from sparse_bitnet.nn.stored_settings import latent_layers, named_layers
from sparse_bitnet.nn.swap import set_pattern, set_residual
from sparse_bitnet.recipe import NMPattern, Recipe
from sparse_bitnet.training.monitors import MaskMonitor, non_finite_tensors, weight_histograms
from sparse_bitnet.training.run_log import append_line, drop_steps_after, is_histogram_due
from sparse_bitnet.training.schedules import PatternSchedule, ResidualSchedule, falling_share
from sparse_bitnet.training.sharding import whole_tensor

INITIAL_DECAY = "initial_weight_decay"
REMEDY = "The last checkpoint stands; lower the learning rate or raise the warm-up, and resume from it."


class TrainingDiverged(ValueError):
    """Loss, gradients or weights are no longer finite; the message names the step and the tensor."""


class SparseBitNetCallback(TrainerCallback):
    """Pass it in `callbacks=[...]`; the model has been through `prepare`.

    schedule            the pattern of every step; None leaves the pattern alone
    weight_decay_until  share of the steps at which the weight decay, falling in a line, has reached 0; None keeps it
    metrics_file        JSON lines, one a log event, with the readings of every layer; validation losses between them
    histograms_file     JSON lines, 17 in a run, with the histograms of the latent weights of every layer
    sparse_shapes       picks, from the shapes [O, I] of the layers, those whose forward products run on sparse tensor
                        cores; asked once for each pattern of the schedule; None picks none
    residual            how much of the latent weight is added at every step (see `set_residual`); products run dense
                        while there is some. None adds nothing

    The layers' effective weights are made once an optimizer step (see `StepWeights`). With each log event the callback
    adds `pattern`, `flip_rate`, `zeros`, `zeros_natural`, `zeros_masked` and `polarisation` (see `LayerReading`) to the
    logs and to `state.log_history`. A logger that stands before it among the callbacks, as those of `report_to` do,
    does not see them: move the callback to the front of `trainer.callback_handler.callbacks`, or use
    `sparse_bitnet.training.trainer.Trainer`, which does. Non-finite gradients stop training before the optimizer uses
    them, on a GPU in the steps that log alone (see `looks_for_nan`), and not with fp16, where they are the signal to
    the GradScaler to skip the step and scale less. Non-finite weights stop it before they are saved.
    """

    def __init__(
        self,
        schedule: PatternSchedule | None = None,
        weight_decay_until: float | None = None,
        metrics_file: Path | str | None = None,
        histograms_file: Path | str | None = None,
        sparse_shapes: Callable[[Collection[Shape], Recipe], Collection[Shape]] | None = None,
        residual: ResidualSchedule | None = None,
    ) -> None:
        self.schedule = schedule
        self.weight_decay_until = weight_decay_until
        self.metrics_file = None if metrics_file is None else Path(metrics_file)
        self.histograms_file = None if histograms_file is None else Path(histograms_file)
        self.sparse_shapes = sparse_shapes
        self.residual = residual
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
        for file in (self.metrics_file, self.histograms_file):
            if file is not None and state.is_world_process_zero:
                drop_steps_after(file, state.global_step or -1)  # a run from the beginning keeps nothing
        if state.global_step == 0:
            self._write_histograms(kwargs["model"], state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._set_pattern(kwargs["model"], state)
        if self.residual is not None:
            set_residual(kwargs["model"], self.residual.share_at(state.global_step, state.max_steps))
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
        if self.residual is not None:  # a schedule that lasts to the last step ends here
            set_residual(kwargs["model"], self.residual.share_at(state.global_step, state.max_steps))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        if args.fp16 or not looks_for_nan(state, args.device):
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
        if is_histogram_due(state.global_step, state.max_steps):
            self._write_histograms(kwargs["model"], state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            if logs is not None and "eval_loss" in logs:
                self._write_metrics(state, logs)
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
        self._write_metrics(state, {**logs, "layers": {name: asdict(layer) for name, layer in layers.items()}})

    def _write_metrics(self, state: TrainerState, values: dict[str, Any]) -> None:
        if self.metrics_file is not None and state.is_world_process_zero:
            append_line(self.metrics_file, state.global_step, values)

    def _write_histograms(self, model: nn.Module, state: TrainerState) -> None:
        if self.histograms_file is None:
            return
        layers = weight_histograms(model)  # on every process: they gather what is split
        recipe = next((layer.recipe for _, layer in named_layers(model)), None)
        if recipe is not None and state.is_world_process_zero:
            about = {"pattern": str(recipe.pattern), "values": recipe.values}
            append_line(self.histograms_file, state.global_step, {**about, "layers": layers})

    def _set_pattern(self, model: nn.Module, state: TrainerState) -> None:
        if self.schedule is None:
            return
        wanted = self.schedule.pattern_at(min(state.global_step, state.max_steps - 1), state.max_steps)
        if any(layer.recipe.pattern != wanted for layer in latent_layers(model).values()):
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
