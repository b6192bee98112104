"""The Hugging Face Trainer, with checkpoints that are whole or not there, and the same on any number of processes."""

from __future__ import annotations

import math
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import DefaultFlowCallback, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from sparse_bitnet.checkpoint.directory import check_directory, publish_directory, read_json, remove_directory
from sparse_bitnet.checkpoint.loading import open_model
from sparse_bitnet.training.callback import INITIAL_DECAY, REMEDY, SparseBitNetCallback, TrainingDiverged, looks_for_nan
from sparse_bitnet.training.fused_loss import logits_budget
from sparse_bitnet.training.monitors import first_non_finite_module
from sparse_bitnet.training.preemption import StopOnSignal
from sparse_bitnet.training.processes import failing_together, from_all_processes, on_any_process
from sparse_bitnet.training.sharding import (
    shard_model,
    split_optimizer_state,
    whole_optimizer_state,
    whole_tensor,
    whole_weights,
)

SETTINGS = ("betas", "eps", "weight_decay", "initial_lr")  # of an optimizer's groups
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
INCOMPLETE = ".incomplete"  # where a checkpoint grows until it gets its name


class Trainer(transformers.Trainer):
    """Saves to a hidden directory, flushes it, and renames it: a kill at any moment leaves the last whole checkpoint.

    Old checkpoints go only after the new one has its name. A loss that is not finite stops training with the step and
    the first layer that produced it. `SparseBitNetCallback` moves in front of the loggers, which so see its readings.

    sharding  `fsdp2` splits weights, gradients and optimizer state over the processes. This is done here and not by the
              FSDP plugin of accelerate, which turns into DDP on CPUs, hands bf16 weights to the layers, and writes
              checkpoints that only FSDP reads; ours are those of one process.
    """

    _staging: Path | None = None
    model: Any  # None for a moment only, transformers says Optional; so are these
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, sharding: Literal["none", "fsdp2"] = "none", **kwargs: Any) -> None:
        self.sharded = sharding == "fsdp2"
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.sort(key=_turn)
        if self.is_world_process_zero():
            remove_directory(Path(self.args.output_dir or ".") / INCOMPLETE)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if looks_for_nan(self.state, loss.device) and on_any_process(not bool(torch.isfinite(loss))):
            name = first_non_finite_module(self.model, self._prepare_inputs(inputs))
            found = from_all_processes((loss.item(), name))
            value, name = next((value, name) for value, name in found if not math.isfinite(value))
            where = f"{name} is the first layer whose output is not finite" if name else "every layer is finite"
            raise TrainingDiverged(f"step {self.state.global_step + 1}: the loss is {value}; {where}. {REMEDY}")
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.args.use_liger_kernel:
            inputs = {**inputs, **logits_budget(self.model, inputs["input_ids"].numel())}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.sharded:  # accelerate adds autocast and torch.compile, not DDP
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = lambda model, *_, **__: prepare(
                model, device_placement=False, evaluation_mode=True
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.sharded and self.optimizer is None:
            shard_model(self.model, self.args.device)
        return super().create_optimizer(*args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm: Any = super()._clip_grad_norm(model)
        return whole_tensor(norm)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As `from_pretrained` reads it: a mixture's experts lie in the file one by one, by names that the model lacks.

        Trainer passes over names that the model lacks, and would go on with other weights. Holds the weights twice.
        """
        stored = open_model(resume_from_checkpoint, self.model.dtype)
        (model or self.model).load_state_dict(stored.state_dict())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.sharded:
            return super().save_model(output_dir, _internal_call)
        weights = whole_weights(self.model)
        with failing_together():
            if self.args.should_save:
                self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = whole_optimizer_state(self.optimizer)
        with failing_together():
            if self.args.should_save:
                torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The state of a checkpoint, under the settings of this run: a rate that was changed counts from here on."""
        settings = [{name: group[name] for name in SETTINGS if name in group} for group in self.optimizer.param_groups]
        rates: Any = list(getattr(self.lr_scheduler, "base_lrs", ()))
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, mmap=True, weights_only=True)
            self.optimizer.load_state_dict(split_optimizer_state(state, self.optimizer))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        if checkpoint is None or not isinstance(self.lr_scheduler, LambdaLR):  # others have no rate of a step by itself
            return
        scheduler, step = self.lr_scheduler, self.lr_scheduler.last_epoch
        scheduler.base_lrs = rates
        scheduler._last_lr = [rate * share(step) for rate, share in zip(rates, scheduler.lr_lambdas, strict=True)]
        for group, wanted, rate in zip(self.optimizer.param_groups, settings, scheduler.get_last_lr(), strict=True):
            group.update(wanted, lr=rate)
            if INITIAL_DECAY in group:
                group[INITIAL_DECAY] = wanted["weight_decay"]

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        root = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = root / INCOMPLETE
        try:
            with failing_together():
                super()._save_checkpoint(model, trial)
            with failing_together():  # every process has written its own files
                if self.is_world_process_zero():
                    publish_directory(self._staging / name, root / name)
                    remove_old_checkpoints(root, self.args.save_total_limit, self.state.global_step)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(f"{root / name} could not be saved ({error}): the checkpoints before it stand") from error
        finally:
            if self.is_world_process_zero():
                remove_directory(self._staging)
            self._staging = None


def _turn(callback: TrainerCallback) -> int:
    """What decides whether to log, save and stop comes first, then our readings and checks, then the loggers."""
    decides = isinstance(callback, DefaultFlowCallback | StopOnSignal)
    return 0 if decides else 1 if isinstance(callback, SparseBitNetCallback) else 2


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints below `root`, oldest first."""
    found = [path for path in root.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def remove_old_checkpoints(root: Path, keep: int | None, step: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`; None keeps them all.

    Later ones are damaged, as the run has passed them over: they count for nothing, and stay until it gets there.
    """
    of_the_run = [checkpoint for checkpoint in checkpoints(root) if checkpoint_step(checkpoint) <= step]
    for checkpoint in of_the_run[:-keep] if keep else []:
        remove_directory(checkpoint)


def newest_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be resumed from, None without one; and why each newer one cannot."""
    refusals: list[str] = []
    for checkpoint in reversed(checkpoints(root)):
        damage = checkpoint_damage(checkpoint)
        if damage is None:
            return checkpoint, refusals
        refusals.append(damage)
    return None, refusals


def checkpoint_damage(checkpoint: Path) -> str | None:
    """What keeps Trainer from resuming from `checkpoint`, None where it is whole."""
    try:
        check_directory(checkpoint)
        read_json(checkpoint / "trainer_state.json")
    except ValueError as error:
        return str(error)
    for name in ("optimizer.pt", "scheduler.pt"):
        if not zipfile.is_zipfile(checkpoint / name):
            return f"{checkpoint / name} is missing or damaged"
    return None
