"""The Hugging Face Trainer, with checkpoints that are there whole or not at all."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import DefaultFlowCallback, TrainerCallback

from sparse_bitnet.checkpoint.directory import check_directory, publish_directory, read_json, remove_directory
from sparse_bitnet.training.callback import REMEDY, SparseBitNetCallback, TrainingDiverged, looks_for_nan
from sparse_bitnet.training.monitors import first_non_finite_module

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
INCOMPLETE = ".incomplete"  # where a checkpoint grows until it gets its name


class Trainer(transformers.Trainer):
    """Saves to a hidden directory, flushes it, and renames it: a kill at any moment leaves the last whole checkpoint.

    Old checkpoints go only after the new one has its name. A loss that is not finite stops training with the step and
    the first layer that produced it. `SparseBitNetCallback` moves in front of the loggers, which so see its readings.
    """

    _staging: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.sort(key=_turn)
        if self.is_world_process_zero():
            remove_directory(Path(self.args.output_dir or ".") / INCOMPLETE)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if looks_for_nan(self.state, loss.device) and not bool(torch.isfinite(loss)):
            name = first_non_finite_module(model, self._prepare_inputs(inputs))
            where = f"{name} is the first layer whose output is not finite" if name else "every layer is finite"
            raise TrainingDiverged(f"step {self.state.global_step + 1}: the loss is {loss.item()}; {where}. {REMEDY}")
        return loss

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        root = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = root / INCOMPLETE
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                publish_directory(self._staging / name, root / name)
                remove_old_checkpoints(root, self.args.save_total_limit)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(f"{root / name} could not be saved ({error}): the checkpoints before it stand") from error
        finally:
            if self.is_world_process_zero():
                remove_directory(self._staging)
            self._staging = None


def _turn(callback: TrainerCallback) -> int:
    """What decides whether to log and save comes first, then our readings and checks, then the loggers."""
    return 0 if isinstance(callback, DefaultFlowCallback) else 1 if isinstance(callback, SparseBitNetCallback) else 2


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints below `root`, oldest first."""
    found = [path for path in root.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def remove_old_checkpoints(root: Path, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints; None keeps them all."""
    for checkpoint in checkpoints(root)[:-keep] if keep else []:
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
