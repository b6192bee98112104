"""Processes that train on a GPU, one run after another, and are replaced where a run failed.

A fault in a kernel leaves the CUDA context of its process unusable, and whatever that process trains next fails too.
Under MPS it is so for all processes on that GPU, and none is admitted until all of them have ended. A run begun on
that GPU before then would fail for no fault of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from experiments.results import Result
from experiments.settings import Run

PATIENCE = 10.0  # seconds that processes have for ending: with an unusable context they may hang

MakeTrainer = Callable[[int, Path], Callable[[Run], Result]]
"""From the index of a GPU and the directory of the corpus, in the process that will train there."""


class Trainer:
    """Trains on the GPU of that index, or on the CPU where there is none, with the corpus read onto it once."""

    def __init__(self, gpu: int, data: Path) -> None:
        import torch

        from experiments.corpus import load

        self.device = torch.device("cpu")
        if torch.cuda.device_count():  # is_available() is false as well where a GPU does not answer
            self.device = torch.device("cuda", gpu)
            torch.cuda.set_device(self.device)
        limits: Any = torch._dynamo.config  # one process trains models of many recipes
        limits.recompile_limit, limits.fail_on_recompile_limit_hit = 64, True
        limits.automatic_dynamic_shapes = False
        self.corpus = load(data, self.device)
        self.kind: tuple[Any, ...] = ()

    def __call__(self, run: Run) -> Result:
        import torch

        from experiments.training import train

        if self.kind != (kind := _kind(run)):  # other code to compile; what was made on this disk is found again
            torch.compiler.reset()
            self.kind = kind
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return train(run, self.corpus, self.device)


class Worker:
    """One run at a time on one GPU, in a process that is started when there is a run for it."""

    connection: Connection

    def __init__(self, gpu: int, data: Path, make_trainer: MakeTrainer) -> None:
        self.gpu, self.data, self.make_trainer = gpu, data, make_trainer
        self.process: BaseProcess | None = None
        self.run: Run | None = None
        self.failed = False

    def begin(self, run: Run) -> None:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_work, args=(theirs, self.make_trainer, self.gpu, self.data))
            self.process.start()
            theirs.close()
        self.run = run
        self.send(run)

    def send(self, run: Run | None) -> None:
        """A run, or None to end the process; one that has died is noticed when its answer is read."""
        with suppress(OSError):
            self.connection.send(run)

    def finish(self) -> tuple[Run, Result | str]:
        """Its run, and the result or the reason why there is none; waits until it is there."""
        assert self.process is not None and self.run is not None
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(PATIENCE)
            answer = f"its process ended with exit code {self.process.exitcode}"
        run, self.run, self.failed = self.run, None, isinstance(answer, str)
        return run, answer


def free(workers: list[Worker]) -> list[Worker]:
    """Those that can begin a run: where one failed, none until the GPU is idle, and then all in fresh processes."""
    failed = {worker.gpu for worker in workers if worker.failed}
    busy = {worker.gpu for worker in workers if worker.run}
    end([worker for worker in workers if worker.gpu in failed - busy])
    return [worker for worker in workers if worker.run is None and worker.gpu not in failed & busy]


def answered(workers: list[Worker]) -> list[Worker]:
    """Those whose run is over, of some that have one; waits for the first."""
    ready = connection.wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in ready]


def end(workers: list[Worker]) -> None:
    """End their processes, by force those that are still there after `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    for worker in workers:
        if worker.process is not None:
            worker.send(None)
    for worker in workers:
        if worker.process is not None:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.join(PATIENCE)
            worker.connection.close()
        worker.process, worker.failed = None, False


def _work(runs: Connection, make_trainer: MakeTrainer, gpu: int, data: Path) -> None:
    """Answer each run by its result until None comes, or by a sentence, the last answer, where it fails."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        train = make_trainer(gpu, data)
        while (run := runs.recv()) is not None:
            runs.send(train(run))
    except Exception as error:
        runs.send(f"{type(error).__name__}: {error}")


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever, and keep its GPU."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _kind(run: Run) -> tuple[Any, ...]:
    """Runs of one kind share compiled code."""
    return run.size, run.recipe.values, run.recipe.gradient, run.residual > 0
