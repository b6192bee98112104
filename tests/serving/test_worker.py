"""The worker at the moments that requests over HTTP do not hit at will."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sparse_bitnet._native", reason="the native kernels are not built")

from sparse_bitnet.engine.decoder import Decoder
from sparse_bitnet.engine.sampling import Sampling
from sparse_bitnet.serving import worker as room
from sparse_bitnet.serving.worker import Worker


def test_a_request_that_comes_while_the_worker_ends_is_told(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw a worker that runs, and asks one that has looked for the last time at who waits."""
    worker, job = Worker(Decoder(model_directory), 1), room.Job

    def after_the_end(*given: Any) -> room.Job:
        worker.end()
        return job(*given)

    async def ask() -> None:
        worker.submit([1], 1, Sampling(), ())

    monkeypatch.setattr(room, "Job", after_the_end)
    with pytest.raises(RuntimeError, match="the server is ending"):
        asyncio.run(ask())


def test_those_who_hang_up_do_not_wait(model_directory: Path) -> None:
    decoder, may_go_on = Decoder(model_directory), threading.Event()
    forward = decoder.forward
    decoder.forward = lambda *given: (may_go_on.wait(20), forward(*given))[1]  # type: ignore[method-assign]
    worker = Worker(decoder, 1)

    async def ask() -> None:
        first = worker.submit([1], 2, Sampling(), ())
        while not worker.running:
            await asyncio.sleep(0.005)
        second = worker.submit([1], 2, Sampling(), ())
        for _ in range(300):
            worker.drop(first)
        assert worker.waiting == 1
        may_go_on.set()
        assert len([token async for token in second.tokens()]) == 2

    asyncio.run(ask())
    until = time.monotonic() + 10
    while (worker.running or worker.waiting) and time.monotonic() < until:
        time.sleep(0.005)
    assert (worker.running, worker.waiting) == (0, 0)
    worker.end()
