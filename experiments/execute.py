"""Train the runs that tables lack, several at a time, until the minutes are up.

    python -m experiments.execute sweep claim --minutes 9 --pack claim.tar.xz

A run that has a result file is not done again, so the same command goes on where it ended. Runs are started in the
order of the tables named, and none that is not expected to be over by the end of the minutes. Each result is a file
of its own as soon as its run is done, and `--pack` holds those of this call. Workers of one GPU take turns, and
are together slower than one, unless NVIDIA's MPS is on (`nvidia-cuda-mps-control -d`).
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.results import Result, Results
from experiments.settings import PAPER, TOY, Run, Scale
from experiments.tables import TABLES, missing

OPERATIONS_A_SECOND = 1.9e14  # of one GPU, before there is a measurement: 1.8 M weights on an H200
OVERHEAD = 30.0  # seconds of a run that do not go by its operations: compilation, evaluation

_worker: dict[str, Any] = {}  # of this process, where it is a worker: its device and the corpus there


@dataclass
class Clock:
    """How long a run is expected to take, from what those before it took in this call; `share` runs share a GPU."""

    minutes: float
    share: int
    begin: float = field(default_factory=time.monotonic)
    rate: float = OPERATIONS_A_SECOND

    def expected(self, run: Run) -> float:
        """Seconds."""
        return OVERHEAD + self.share * run.operations / self.rate

    def learn(self, run: Run, seconds: float) -> None:
        """The slowest rate so far counts, once there is one; the overhead is taken as told above."""
        measured = self.share * run.operations / max(seconds - OVERHEAD, 0.2 * seconds)
        self.rate = measured if self.rate == OPERATIONS_A_SECOND else min(self.rate, measured)

    def left(self) -> float:
        """Seconds."""
        return 60 * self.minutes - (time.monotonic() - self.begin)


def execute(
    tables: Annotated[list[str], typer.Argument(help=f"In order of importance: {', '.join(TABLES)}.")],
    data: Annotated[Path, typer.Option(help="What experiments.corpus wrote.")] = Path("experiments/data"),
    out: Annotated[Path, typer.Option(help="Result files.")] = Path("experiments/results/runs"),
    minutes: Annotated[float, typer.Option(help="Start no run that is expected to end later.")] = 9.0,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs to spread the runs over.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time on each GPU.")] = 2,
    pack: Annotated[
        Path | None, typer.Option(help="A .tar.xz of the results of this call, written after each.")
    ] = None,
    toy: Annotated[bool, typer.Option("--toy", help="A scale for a CPU, to see that everything runs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs that are missing, train nothing.")] = False,
) -> None:
    """Train what the tables lack."""
    unknown = set(tables) - set(TABLES)
    if unknown:
        raise typer.BadParameter(f"{sorted(unknown)[0]!r} is no table: choose from {', '.join(TABLES)}")
    scale, results = TOY if toy else PAPER, Results(out)
    if dry_run:
        describe(scale, results, tables, Clock(minutes, workers))
        return
    done = train_missing(scale, results, tables, data, Clock(minutes, workers), gpus, workers, pack)
    left = len(missing(scale, results, tables))
    print(f"{done} runs done, {left} missing{'' if not left else ': the same command goes on'}", flush=True)


def describe(scale: Scale, results: Results, tables: list[str], clock: Clock) -> None:
    """Print the runs that are missing and what they are expected to take, one at a time on one GPU."""
    runs, total = missing(scale, results, tables), 0.0
    for run in runs:
        seconds = run.operations / clock.rate
        total += seconds
        print(f"{run.name:<44}{run.tokens / 1e6:>8.0f} M tokens{run.steps:>7} steps{seconds:>7.0f} s")
    print(
        f"{len(runs)} runs, {total / 60:.0f} minutes of one GPU at {clock.rate:.2g} operations a second, and compiling"
    )


def train_missing(
    scale: Scale,
    results: Results,
    tables: list[str],
    data: Path,
    clock: Clock,
    gpus: int,
    workers: int,
    pack: Path | None,
) -> int:
    """Train until nothing is missing or the time is up; how many runs are done. A run that fails is told and left."""
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    for _, gpu in itertools.product(range(workers), range(gpus)):
        devices.put(gpu)
    finished: list[str] = []
    failed: set[str] = set()
    running: dict[Future[Result], Run] = {}
    with ProcessPoolExecutor(gpus * workers, context, _begin_worker, (devices, data)) as pool:
        while True:
            busy = {run.key for run in running.values()} | failed
            waiting = [run for run in missing(scale, results, tables) if run.key not in busy]
            for run in waiting[: gpus * workers - len(running)]:
                if clock.expected(run) > clock.left():
                    break
                running[pool.submit(_train, run)] = run
            if not running:
                return len(finished)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                error = future.exception()
                if error is not None:
                    failed.add(run.key)
                    print(f"{run.name} FAILED: {type(error).__name__}: {error}", flush=True)
                    continue
                result = future.result()
                results.add(run, result)
                finished.append(run.key)
                clock.learn(run, result["seconds"])
                print(_line(run, result, clock), flush=True)
                if pack is not None:
                    results.pack(pack, finished)


def _line(run: Run, result: Result, clock: Clock) -> str:
    told = f"diverged at step {result['diverged_at']}"
    if result["diverged_at"] is None:
        told = f"perplexity {result['perplexity']['test']:8.3f}"
    rate = f"lr {run.learning_rate:.3g}, {result['tokens_per_second'] / 1e6:.2f} M tokens/s"
    return f"{run.name:<44} {told}, {rate}, {result['seconds']:.0f} s, {clock.left() / 60:.1f} minutes left"


def _begin_worker(devices: Any, data: Path) -> None:
    """Take a GPU, or the CPU where there is none, and read the corpus onto it."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    import torch

    from experiments.corpus import load

    index = devices.get()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    limits: Any = torch._dynamo.config  # one process trains models of many recipes
    limits.recompile_limit, limits.fail_on_recompile_limit_hit = 64, True
    limits.automatic_dynamic_shapes = False
    _worker.update(device=device, corpus=load(data, device))


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever, and keep its GPU."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _train(run: Run) -> Result:
    import torch

    from experiments.training import train

    if _worker.get("kind") != (kind := _kind(run)):  # other code to compile; what was made on this disk is found again
        torch.compiler.reset()
        _worker["kind"] = kind
    if _worker["device"].type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return train(run, _worker["corpus"], _worker["device"])


def _kind(run: Run) -> tuple[Any, ...]:
    """Runs of one kind share compiled code."""
    return run.size, run.recipe.values, run.recipe.gradient, run.residual > 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(execute)
