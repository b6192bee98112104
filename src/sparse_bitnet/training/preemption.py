"""SIGTERM, by which a cluster takes a machine back: finish the step, save, stop, on all processes at the same step."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_bitnet.training.processes import on_any_process

SAME_REQUEST = 5.0  # seconds: a scheduler and torchrun may both pass on one signal


class StopOnSigterm(TrainerCallback):
    """Catches SIGTERM while it is entered as a context; a second one, `SAME_REQUEST` later or more, ends at once."""

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._before: Any = None

    def __enter__(self) -> StopOnSigterm:
        if threading.current_thread() is threading.main_thread():  # Python hears signals there alone
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if on_any_process(self._asked_at is not None):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # little time is left

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif now - self._asked_at >= SAME_REQUEST:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
