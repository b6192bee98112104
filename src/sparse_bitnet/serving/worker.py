"""A thread that steps a `Batch`, and what asyncio asks of it: answers begin, go on side by side, and are dropped."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Collection, Sequence
from queue import SimpleQueue

from sparse_bitnet.engine.batch import Batch, Writing
from sparse_bitnet.engine.decoder import Decoder
from sparse_bitnet.engine.sampling import Sampling

MOST_WAITING = 256
logger = logging.getLogger("uvicorn.error")


class BusyError(Exception):
    """As many wait as may wait."""


class Job:
    """An answer that was asked for; its tokens come from the worker's thread to the loop that asked."""

    def __init__(
        self, worker: Worker, prompt: Sequence[int], new: int, sampling: Sampling, stop: Collection[int]
    ) -> None:
        self.prompt, self.new, self.sampling, self.stop = prompt, new, sampling, stop
        self.writing: Writing | None = None
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._tokens: asyncio.Queue[int | Exception | None] = asyncio.Queue()

    async def tokens(self) -> AsyncGenerator[int]:
        """As they are written; ValueError where the engine cannot go on, RuntimeError where the worker has ended."""
        while (token := await self._tokens.get()) is not None:
            if isinstance(token, Exception):
                raise token
            yield token

    def drop(self) -> None:
        """Nobody waits for it any more: its sequence makes room at the next step."""
        self._worker.drop(self)

    def deliver(self, token: int | Exception | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tokens.put_nowait, token)


class Worker:
    """At most `most` sequences go on side by side, the others wait in their order."""

    def __init__(self, decoder: Decoder, most: int) -> None:
        self.decoder, self.most = decoder, most
        self._batch = Batch(decoder)
        self._orders: SimpleQueue[tuple[str, Job | None]] = SimpleQueue()
        self._asked: set[Job] = set()  # those whose orders are not taken yet
        self._waiting: deque[Job] = deque()
        self._running: dict[Writing, Job] = {}
        self._end: str | None = None  # why it goes on no more
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._asked) + len(self._waiting)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, prompt: Sequence[int], new: int, sampling: Sampling, stop: Collection[int]) -> Job:
        """Ask for `new` tokens; BusyError where too many wait, RuntimeError where the worker has ended."""
        if self._end is not None:
            raise RuntimeError(self._end)
        if self.waiting >= MOST_WAITING:
            raise BusyError(f"{self.waiting} requests wait already")
        job = Job(self, prompt, new, sampling, stop)
        self._asked.add(job)
        self._orders.put(("begin", job))
        if self._end is not None:  # it may have ended since, and looked for the last time at who waits
            raise RuntimeError(self._end)
        return job

    def drop(self, job: Job) -> None:
        self._orders.put(("drop", job))

    def end(self) -> None:
        """Answers that are on their way end with an error. Waits for the step that is being taken."""
        self._orders.put(("end", None))
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._obey():
                self._begin()
                self._step()
            self._end = "the server is ending"
        except Exception as error:  # whatever it is, those who wait must hear of it
            logger.exception("the engine stopped")
            self._end = f"the engine has stopped: {error}"
        late = [self._orders.get()[1] for _ in range(self._orders.qsize())]
        for job in {*self._running.values(), *self._waiting, *late} - {None}:
            job.deliver(RuntimeError(self._end))
        self._running.clear()
        self._waiting.clear()
        self._asked.clear()

    def _obey(self) -> bool:
        """Take the orders that are there, or wait for one where there is nothing to do; False is the end."""
        while not self._orders.empty() or not (self._running or self._waiting):
            order, job = self._orders.get()
            if job is None:
                return False
            if order == "begin":
                self._asked.discard(job)
                self._waiting.append(job)
            elif job.writing is not None:
                self._batch.drop(job.writing)
                self._running.pop(job.writing, None)
            elif job in self._waiting:
                self._waiting.remove(job)
        return True

    def _begin(self) -> None:
        while self._waiting and len(self._running) < self.most:
            job = self._waiting.popleft()
            try:
                job.writing = self._batch.add(job.prompt, job.new, job.sampling, job.stop)
            except ValueError as error:
                job.deliver(error)
            else:
                self._running[job.writing] = job

    def _step(self) -> None:
        for writing, token in self._batch.step():
            self._running[writing].deliver(token)
            if writing.is_done:
                self._running.pop(writing).deliver(None)
