"""Several processes, started by torchrun or accelerate launch, that wait for each other, fail and decide together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

LONGEST_WAIT = timedelta(days=2)  # while the first tokenizes a corpus; a process that has ended is noticed at once

T = TypeVar("T")


class OtherProcessFailed(SystemExit):
    """Another process failed and says why; this one ends with the same status, 2, and says nothing."""

    def __init__(self) -> None:
        super().__init__(2)


def join_processes() -> PartialState:
    """The processes of this run, connected (NCCL on GPUs, gloo on CPUs); one where no launcher started several."""
    return PartialState(cpu=not torch.cuda.is_available())


def leave_processes() -> None:
    """Disconnect, at the end of a program in which all went well."""
    if dist.is_initialized():
        _messages.cache_clear()
        dist.destroy_process_group()


def is_first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def from_all_processes(value: T) -> list[T]:
    """The value of each process, by rank, on all of them; every process takes part."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_messages())
    return values


def on_any_process(flag: bool) -> bool:
    """Whether the flag is set on some process; every process takes part. No GPU waits for it."""
    if not dist.is_initialized():
        return flag
    told = torch.tensor(int(flag))
    dist.all_reduce(told, dist.ReduceOp.MAX, group=_messages())
    return bool(told)


@contextmanager
def failing_together() -> Iterator[None]:
    """Every process runs the block. Where it fails on some, the first of these raises its error, all others leave."""
    error: BaseException | None = None
    try:
        yield
    except (Exception, OtherProcessFailed) as caught:
        error = caught
    failed = from_all_processes(error is not None and not isinstance(error, OtherProcessFailed))
    if True not in failed:
        return
    if error is not None and (not dist.is_initialized() or failed.index(True) == dist.get_rank()):
        raise error
    raise OtherProcessFailed from error


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block while the others wait, then they run it: they find the files that it made."""
    if not is_first_process():
        with failing_together():
            pass
    with failing_together():
        yield
    if is_first_process():
        with failing_together():
            pass


@cache
def _messages() -> dist.ProcessGroup:
    """A group on the CPU: its messages do not wait for the GPU, nor it for them."""
    group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    assert isinstance(group, dist.ProcessGroup)
    return group
