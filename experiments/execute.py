"""Train the runs that tables lack, several at a time, until the minutes are up.

    python -m experiments.execute sweep claim --minutes 9 --pack claim.tar.xz

A run that has a result file is not done again, so the same command goes on where it ended. Runs are started in the
order of the tables named, but for those that are not expected to be over by the end of the minutes. Each result is a
file of its own as soon as its run is done, and `--pack` holds those of this call. A run that fails is tried once more,
in a fresh process. Workers of one GPU take turns, and are together slower than one, unless NVIDIA's MPS is on
(`nvidia-cuda-mps-control -d`).
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from experiments.corpus import describe
from experiments.results import Result, Results
from experiments.settings import PAPER, SHAPES, TOY, Run, Scale
from experiments.tables import TABLES, missing
from experiments.workers import MakeTrainer, Trainer, Worker, answered, end, free

OPERATIONS_A_SECOND = 1.9e14  # of one GPU, before there is a measurement: 1.8 M weights on an H200
OVERHEAD = 30.0  # seconds of a run that do not go by its operations: compilation, evaluation
ATTEMPTS = 2  # at a run, as a fault may be the GPU's


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
        tell_missing(scale, results, tables, Clock(minutes, workers))
        return
    try:
        has, takes = describe(data)["vocabulary"], min(SHAPES[size].vocabulary for size in scale.sizes)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if has > takes:
        raise typer.BadParameter(
            f"{data} has {has} tokens, and these models take {takes}: "
            f"python -m experiments.corpus DATA DIRECTORY --vocabulary {takes} makes a corpus for them"
        )
    done = train_missing(scale, results, tables, data, Clock(minutes, workers), gpus, workers, pack)
    left = len(missing(scale, results, tables))
    print(f"{done} runs done, {left} missing{'' if not left else ': the same command goes on'}", flush=True)


def tell_missing(scale: Scale, results: Results, tables: list[str], clock: Clock) -> None:
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
    make_trainer: MakeTrainer = Trainer,
) -> int:
    """Train until nothing is missing or the time is up; how many runs are done. A run that fails twice is left."""
    pool = [Worker(gpu, data, make_trainer) for _, gpu in itertools.product(range(workers), range(gpus))]
    finished: list[str] = []
    failures: Counter[str] = Counter()
    try:
        while True:
            busy = {worker.run.key for worker in pool if worker.run}
            runs = [run for run in missing(scale, results, tables) if run.key not in busy]
            waiting = [run for run in runs if failures[run.key] < ATTEMPTS]
            fitting = [run for run in waiting if clock.expected(run) <= clock.left()]
            for run, worker in zip(fitting, free(pool), strict=False):
                worker.begin(run)
            running = [worker for worker in pool if worker.run]
            if not running:
                return len(finished)
            for worker in answered(running):
                run, result = worker.finish()
                if isinstance(result, str):
                    failures[run.key] += 1
                    told = "FAILED" if failures[run.key] == ATTEMPTS else "failed once"
                    print(f"{run.name} {told}: {result}", flush=True)
                    continue
                results.add(run, result)
                finished.append(run.key)
                clock.learn(run, result["seconds"])
                print(_line(run, result, clock), flush=True)
                if pack is not None:
                    results.pack(pack, finished)
    finally:
        end(pool)


def _line(run: Run, result: Result, clock: Clock) -> str:
    told = f"diverged at step {result['diverged_at']}"
    if result["diverged_at"] is None:
        told = f"perplexity {result['perplexity']['test']:8.3f}"
    rate = f"lr {run.learning_rate:.3g}, {result['tokens_per_second'] / 1e6:.2f} M tokens/s"
    return f"{run.name:<44} {told}, {rate}, {result['seconds']:.0f} s, {clock.left() / 60:.1f} minutes left"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(execute)
