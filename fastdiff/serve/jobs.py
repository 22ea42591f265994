"""The requests that are accepted: how many, which one is cancelled, when all are done."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

from fastdiff.errors import UserError, first_line
from fastdiff.serve.drawing import Drawing, Engine, Event, Picture, Step
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.refused import Refused, cancelled

LOG = logging.getLogger("fastdiff")


class Happened(NamedTuple):
    """An event of one of a request's pictures."""

    place: int
    """The picture's number among the request's pictures."""
    event: Event


class Job:
    """A request that draws."""

    def __init__(self) -> None:
        self.happened: asyncio.Queue[Happened | Refused | None] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None

    async def events(self) -> AsyncIterator[Happened]:
        """All events until its pictures are drawn. Raises Refused if they cannot be drawn."""
        while (item := await self.happened.get()) is not None:
            if isinstance(item, Refused):
                raise item
            yield item

    def cancel(self) -> None:
        """Draw it no longer, if it is not done."""
        if self.task is not None:
            self.task.cancel()


class Jobs:
    """Accepts requests as long as there is room for their pictures.

    queue: pictures that may wait beside those that the engine draws at the same time.
    """

    def __init__(self, engine: Engine, queue: int, metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._most = engine.places + queue
        self._by_id: dict[str, Job] = {}
        self._accepted = self._drawing = 0
        self._mean_seconds = 1.0
        """Mean seconds of a picture from its arrival on, with more weight on the latest ones."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        metrics.watch("places", "Pictures drawn at the same time at most", lambda: engine.places)
        metrics.watch("drawing", "Pictures being drawn", lambda: self._drawing)
        metrics.watch("queue_length", "Pictures that wait", lambda: self._accepted - self._drawing)
        metrics.watch(
            "batch_fill", "Share of places being drawn in", lambda: self._drawing / engine.places
        )

    def start(self, name: str, drawings: list[Drawing]) -> Job:
        """Begin to draw, under a name by which it can be cancelled. Refused if it cannot begin."""
        n = len(drawings)
        if self.draining:
            raise Refused(503, "the server is shutting down; try again", "draining", 1)
        if name in self._by_id:
            raise Refused(409, f"a request with X-Request-Id {name} is being drawn; give another")
        if self._accepted + n > self._most:
            wait = math.ceil(n * self._mean_seconds / max(1, self._accepted))
            sentence = (
                f"{self._accepted} of at most {self._most} pictures are being drawn or wait;"
                f" try again in {wait} s"
            )
            raise Refused(429, sentence, "queue_full", wait)
        job = Job()
        self._by_id[name] = job
        self._accepted += n
        self._idle.clear()
        job.task = asyncio.create_task(self._draw_all(job, drawings))
        job.task.add_done_callback(lambda _: self._ended(name, job, n))
        return job

    def cancel(self, name: str) -> None:
        """Cancel a request. Refused if there is no request of this name."""
        if name not in self._by_id:
            raise Refused(404, f"no request {name[:64]!r} is being drawn", "not_found")
        self._by_id[name].cancel()

    async def drain(self) -> None:
        """Accept no more requests; return once all accepted ones are drawn."""
        self.draining = True
        await self._idle.wait()

    def _ended(self, name: str, job: Job, n: int) -> None:
        del self._by_id[name]
        self._accepted -= n
        if job.task is not None and job.task.cancelled():
            job.happened.put_nowait(cancelled())
        if not self._by_id:
            self._idle.set()

    async def _draw_all(self, job: Job, drawings: list[Drawing]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for index, drawing in enumerate(drawings):
                    group.create_task(self._draw(job, index, drawing))
        except BaseExceptionGroup as group_of:
            job.happened.put_nowait(_refusal(group_of.exceptions[0]))
        else:
            job.happened.put_nowait(None)

    async def _draw(self, job: Job, index: int, drawing: Drawing) -> None:
        begun, drawing_now = time.monotonic(), False
        events = self._engine.draw(drawing)
        try:
            async for event in events:
                if isinstance(event, Step):
                    self._metrics.steps.inc()
                    self._drawing += not drawing_now
                    drawing_now = True
                if isinstance(event, Picture):
                    self._metrics.pictures.inc()
                    seconds = time.monotonic() - begun
                    self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
                job.happened.put_nowait(Happened(index, event))
        finally:
            self._drawing -= drawing_now
            await events.aclose()  # type: ignore[attr-defined]  # at once, not when it is collected


def _refusal(error: BaseException) -> Refused:
    """The client's message for an error that drawing raised."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UserError):
        return Refused(400, str(error).splitlines()[0])
    LOG.error("a request failed", exc_info=error)
    return Refused(500, f"drawing failed: {first_line(error)}"[:300])
