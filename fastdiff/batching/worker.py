"""A thread of a batch: draws what waits, step by step, with the batch's pipeline."""

import copy
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastdiff.batching.drawing import Drawing
from fastdiff.batching.groups import Group, finder
from fastdiff.batching.requests import Ticket
from fastdiff.compiler.loop_state import loop_of
from fastdiff.runtime.fixed import PLACES


class Queue:
    """What waits for a worker. Hold `changed` to read or write."""

    def __init__(self) -> None:
        self.waiting: deque[Ticket] = deque()
        self.changed = threading.Condition()
        self.closed = False
        """Whether nothing more is accepted."""
        self.draining = True
        """Whether what was accepted is drawn once it is closed; else it is cancelled."""
        self.workers: Sequence[Worker] = ()


class Worker:
    """Draws up to `capacity` requests at the same time, in its own thread."""

    group = Group

    def __init__(self, pipe: Any, capacity: int, queue: Queue) -> None:
        loop = loop_of(pipe)
        assert loop is not None
        self.pipe, self.capacity, self.queue = pipe, capacity, queue
        self.drawings: list[Drawing] = []
        self.steps = self.filled = 0
        """Steps so far, and places that were filled in them."""
        self._groups: list[Group] = []
        self._find, self._fixed = finder(), loop.invariant
        self._own: dict[str, Any] = {}
        self._threads: int | None = None
        self._ready = threading.Event()
        self.thread = threading.Thread(target=self._work, name="fastdiff batch", daemon=True)

    def beside_others(self, threads: int) -> None:
        """Compute with this many threads; use separate tokenizers, which keep the state of a call.
        Before `start`."""
        self._threads = threads
        kept = {n: v for n, v in self.pipe.components.items() if not isinstance(v, nn.Module)}
        self._own = copy.deepcopy(kept)

    def start(self) -> None:
        """Begin to draw; returns once the thread has its number of threads."""
        self.thread.start()
        self._ready.wait()

    def _work(self) -> None:
        if self._threads is not None:
            torch.get_num_threads()  # a thread's first question sets it to the process's number
            torch.set_num_threads(self._threads)
        self._ready.set()
        try:
            # greenlets share this thread's grad mode, so it must be the same around all of them
            with torch.no_grad():
                while self._admit():
                    self._round()
        except BaseException as error:  # or callers would wait for ever
            with self.queue.changed:
                self.queue.closed = True
                for ticket in self._tickets():
                    if not ticket.done():
                        ticket.fail(error)
                self.queue.waiting.clear()
                self.queue.changed.notify_all()
            raise

    def _admit(self) -> bool:
        """Begin drawing what waits for a place, if there is one; wait if there is nothing to do.
        Returns False once the batch is closed and everything is done."""
        queue = self.queue
        with queue.changed:
            while not queue.waiting and not self.drawings and not queue.closed:
                queue.changed.wait()
            if not queue.waiting and not self.drawings:
                return False
            if queue.closed and not queue.draining:
                for ticket in self._tickets():
                    ticket.cancel()
            begun: list[Drawing] = []
            for ticket in list(queue.waiting):
                if ticket.cancelled or self._room(len(begun)):
                    queue.waiting.remove(ticket)
                    begun.append(Drawing(ticket, self.pipe, self._own))
            self.drawings += begun
        for drawing in begun:
            self._resume(drawing)
        return True

    def _room(self, begun: int) -> bool:
        """Whether one more may begin beside the `begun` that begin now: the worker that draws the
        fewest takes it."""
        mine = len(self.drawings) + begun
        others = (len(worker.drawings) for worker in self.queue.workers if worker is not self)
        return mine < self.capacity and all(mine <= theirs for theirs in others)

    def _tickets(self) -> list[Ticket]:
        return [*self.queue.waiting, *(drawing.ticket for drawing in self.drawings)]

    def _round(self) -> None:
        """Let every drawing go one step on."""
        for drawing in list(self.drawings):
            if drawing.ticket.cancelled:
                self._resume(drawing)
        for group in list(self._groups):
            drawings, error = list(group.drawings), None
            try:
                group.advance()
            except Exception as raised:  # theirs alone: the others go on
                error = raised
            else:
                self.steps += 1
                self.filled += len(drawings)
            for drawing in drawings:
                self._resume(drawing, error)
        for drawing in [drawing for drawing in self.drawings if drawing.seat is None]:
            self._resume(drawing)

    def _resume(self, drawing: Drawing, error: BaseException | None = None) -> None:
        """Let a drawing go on by itself until its next step; then it is in a group, alone or
        done."""
        going = drawing.resume(error)
        group = next((group for group in self._groups if drawing in group.drawings), None)
        if group is not None and drawing.seat is not group.drawings[drawing]:
            group.leave(drawing)
            if not group.drawings:
                self._groups.remove(group)
            group = None
        if group is None and drawing.seat is not None:
            self._join(drawing)
        if not going:
            with self.queue.changed:
                self.drawings.remove(drawing)

    def _join(self, drawing: Drawing) -> None:
        assert drawing.seat is not None
        assert drawing.plans is not None
        for group in self._groups:
            if group.takes(drawing):
                break
        else:
            capacity = PLACES if self._fixed else self.capacity
            group = self.group(self._find, drawing.plans, drawing.seat.kind, capacity, self._fixed)
            self._groups.append(group)
        group.join(drawing)
