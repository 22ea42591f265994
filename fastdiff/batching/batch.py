"""The batch: requests that wait, and the threads that draw them with one pipeline."""

import atexit
import threading
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.batching.requests import Request, Ticket
from fastdiff.batching.worker import Queue, Worker
from fastdiff.compiler.loop_state import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError


@dataclass(frozen=True)
class Stats:
    """What a batch does now, and did so far."""

    active: int
    """Requests that are being drawn."""
    waiting: int
    """Requests that wait for a place."""
    steps: int
    """Steps that the batch ran so far."""
    filled: int
    """Places that were filled in these steps, so `filled / steps` is the mean fill."""


class Batch:
    """Draws requests with a compiled pipeline, in its own threads.

    Until `close` the batch owns the pipeline: draw with it, edit its weights or adapters, and
    move it only before or after. Every method may be called from any thread.

    Args:
        pipe: a pipeline after `fastdiff.compile`; its scheduler is the requests' default.
        capacity: how many pictures each worker draws at the same time.
        workers: threads that draw, all with the same weights. On a CPU they divide torch's threads,
            `torch.get_num_threads()`: in a small network's step cores wait for each other, and with
            a worker for each core they do not. A picture that is drawn alone then uses one worker's
            share of the cores. With a batch-invariant pipeline a picture has the same bits as when
            it is drawn alone with as many threads as a worker has.

    Raises:
        ValueError: the pipeline is not compiled, capacity or workers are below 1, or there are
            several workers for a pipeline on a GPU or with an engine's networks.
    """

    worker = Worker

    def __init__(self, pipe: Any, capacity: int = 4, workers: int = 1) -> None:
        loop = loop_of(pipe)
        if loop is None:
            raise UserError(
                f"Batch was given a {type(pipe).__name__} whose loop is diffusers' own; give a"
                " pipeline that fastdiff.compile has made fast"
            )
        if loop.sharing is not None:
            raise UserError(
                "Batch was given a pipeline whose loops several ranks share; give another"
            )
        for name, count in (("capacity", capacity), ("workers", workers)):
            if type(count) is not int or count < 1:
                raise UserError(f"Batch's {name} is {count!r}; give a whole number, such as 4")
        if workers > 1:
            _check_divisible(pipe, workers)
        self.pipe, self.capacity = pipe, capacity
        self._queue = queue = Queue()
        queue.workers = [self.worker(pipe, capacity, queue) for _ in range(workers)]
        threads = torch.get_num_threads()
        for worker in queue.workers:
            if workers > 1:
                worker.beside_others(max(1, threads // workers))
            worker.start()
        if workers > 1:
            torch.set_num_threads(threads)  # for threads that start later
        atexit.register(self.close, drain=False)

    def submit(self, request: Request) -> Ticket:
        """Accept a request; returns at once. Raises ValueError if the batch is closed."""
        if not isinstance(request, Request):
            raise UserError(f"submit was given a {type(request).__name__}; give a Request")
        with self._queue.changed:
            if self._queue.closed:
                raise UserError("the batch is closed and takes no more requests")
            ticket = Ticket(request)
            self._queue.waiting.append(ticket)
            self._queue.changed.notify_all()
        return ticket

    def stats(self) -> Stats:
        """What the batch does now, and did so far."""
        queue = self._queue
        with queue.changed:
            return Stats(
                active=sum(len(worker.drawings) for worker in queue.workers),
                waiting=len(queue.waiting),
                steps=sum(worker.steps for worker in queue.workers),
                filled=sum(worker.filled for worker in queue.workers),
            )

    def close(self, drain: bool = True) -> None:
        """Accept nothing more; return when every accepted request is done.

        drain: whether to draw them; if not, they are cancelled.
        """
        with self._queue.changed:
            self._queue.closed = True
            self._queue.draining = drain
            self._queue.changed.notify_all()
        threads = [worker.thread for worker in self._queue.workers]
        if threading.current_thread() not in threads:
            for thread in threads:
                thread.join()
            atexit.unregister(self.close)

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(drain=kind is None)


def _check_divisible(pipe: Any, workers: int) -> None:
    """UserError if several threads cannot draw with the pipeline, or would gain nothing."""
    if pipe.device.type != "cpu":
        raise UserError(
            f"Batch got {workers} workers, which divide a CPU's cores, but the pipeline is on"
            f" {pipe.device}; give more capacity instead"
        )
    slots = filter(None, map(slot_of, pipe.components.values()))
    if foreign := next((slot for slot in slots if slot.kind.frozen), None):
        raise UserError(
            f"Batch got {workers} workers, but the {foreign.name} runs by {foreign.kind.runner},"
            " which divides cores by itself; give one worker"
        )
