"""SIGTERM, by which a cluster takes a machine back, and Ctrl-C: finish the step, save, stop, on all processes alike."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_bitnet.training.processes import from_all_processes, on_any_process

SAME_REQUEST = {signal.SIGTERM: 5.0, signal.SIGINT: 1.0}
"""Seconds: a scheduler or a terminal, and torchrun, may both pass on one signal."""
AGAIN = b"finishing the step and saving a checkpoint: Ctrl-C again ends at once\n"


class StopOnSignal(TrainerCallback):
    """Catches SIGTERM and SIGINT while it is entered as a context; a second one, `SAME_REQUEST` later, ends at once.

    received  the signal that stopped training, of whichever process; None while there was none
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._asked: signal.Signals | None = None
        self._asked_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # Python hears signals there alone
            self._before = {number: signal.signal(number, self._ask) for number in SAME_REQUEST}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if on_any_process(self._asked is not None):
            self.received = next(asked for asked in from_all_processes(self._asked) if asked is not None)
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # little time is left

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked, self._asked_at = signal.Signals(number), now
            if number == signal.SIGINT:
                os.write(2, AGAIN)
        elif now - self._asked_at >= SAME_REQUEST[signal.Signals(number)]:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
            os.kill(os.getpid(), number)
