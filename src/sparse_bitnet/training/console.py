"""Progress of a run: a bar on a terminal, a line a log event elsewhere; on the first process only."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SHARES = ("flip_rate", "zeros")


class ConsoleCallback(TrainerCallback):
    """`tokens_per_step`, of all processes, gives the throughput."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        self._last = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = (time.monotonic(), state.global_step)
        if state.is_world_process_zero and sys.stderr.isatty():
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[reading]}"), console=self.console)
            self._bar.add_task("training", total=state.max_steps, completed=state.global_step, reading="")
            self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or not state.is_world_process_zero or not {"loss", "eval_loss"} & set(logs):
            return
        reading = self._reading(logs, state)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], reading=reading)
        else:
            print(f"step {state.global_step}/{state.max_steps}  {reading}", flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _reading(self, logs: dict[str, Any], state: TrainerState) -> str:
        if "eval_loss" in logs:
            self._last = (time.monotonic(), state.global_step)  # evaluation is not training time
            return f"validation loss {logs['eval_loss']:.4f}"
        now = (time.monotonic(), state.global_step)
        rate = (now[1] - self._last[1]) * self.tokens_per_step / max(now[0] - self._last[0], 1e-9)
        self._last = now
        parts = [f"loss {logs['loss']:.4f}", f"lr {logs['learning_rate']:.2e}"]
        parts += [f"{name.replace('_', ' ')} {100 * logs[name]:.2f} %" for name in SHARES if name in logs]
        return "  ".join([*parts, *([logs["pattern"]] if "pattern" in logs else []), f"{rate:,.0f} tokens/s"])
