"""The batch: a thread that owns a pipeline and draws what it is asked for."""

import atexit
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.batching.drawing import Drawing
from fastdiff.batching.groups import Group, finder
from fastdiff.batching.requests import Request, Ticket
from fastdiff.compiler.loop_state import loop_of
from fastdiff.errors import UserError
from fastdiff.runtime.fixed import PLACES


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
    """Draws requests with a compiled pipeline, in a thread of its own.

    Until `close` the pipeline belongs to the batch: draw with it, edit its weights or adapters, and
    move it only before and after. Every method may be called from any thread.

    Args:
        pipe: a pipeline after `fastdiff.compile`; its scheduler is the requests' default.
        capacity: how many pictures are drawn at the same time.

    Raises:
        ValueError: the pipeline is not compiled, or the capacity is not at least 1.
    """

    group = Group

    def __init__(self, pipe: Any, capacity: int = 4) -> None:
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
        if type(capacity) is not int or capacity < 1:
            raise UserError(f"Batch's capacity is {capacity!r}; give how many pictures, as 4")
        self.pipe, self.capacity = pipe, capacity
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._drawings: list[Drawing] = []
        self._groups: list[Group] = []
        self._find, self._fixed = finder(), loop.invariant
        self._steps = self._filled = 0
        self._closed, self._draining = False, True
        self._thread = threading.Thread(target=self._work, name="fastdiff batch", daemon=True)
        self._thread.start()
        atexit.register(self.close, drain=False)

    def submit(self, request: Request) -> Ticket:
        """Accept a request; returns at once. Raises ValueError if the batch is closed."""
        if not isinstance(request, Request):
            raise UserError(f"submit was given a {type(request).__name__}; give a Request")
        with self._changed:
            if self._closed:
                raise UserError("the batch is closed and takes no more requests")
            ticket = Ticket(request)
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def stats(self) -> Stats:
        """What the batch does now, and did so far."""
        with self._changed:
            return Stats(len(self._drawings), len(self._waiting), self._steps, self._filled)

    def close(self, drain: bool = True) -> None:
        """Accept nothing more; return when every accepted request is done.

        drain: whether they are drawn; else they are cancelled.
        """
        with self._changed:
            self._closed = True
            self._draining = drain
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            atexit.unregister(self.close)

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(drain=kind is None)

    def _work(self) -> None:
        try:
            # greenlets share this thread's grad mode, so it must be the same around all of them
            with torch.no_grad():
                while self._admit():
                    self._round()
        except BaseException as error:  # nobody may wait for ever for a thread that has ended
            with self._changed:
                self._closed = True
                for ticket in self._tickets():
                    if not ticket.done():
                        ticket.fail(error)
            raise

    def _admit(self) -> bool:
        """Begin drawing what waits for a place, if there is one; wait if there is nothing to do.
        Returns False once the batch is closed and everything is done."""
        with self._changed:
            while not self._waiting and not self._drawings and not self._closed:
                self._changed.wait()
            if not self._waiting and not self._drawings:
                return False
            if self._closed and not self._draining:
                for ticket in self._tickets():
                    ticket.cancel()
            begun: list[Drawing] = []
            for ticket in list(self._waiting):
                if ticket.cancelled or self._room(len(begun)):
                    self._waiting.remove(ticket)
                    begun.append(Drawing(ticket, self.pipe))
            self._drawings += begun
        for drawing in begun:
            self._resume(drawing)
        return True

    def _room(self, begun: int) -> bool:
        """Whether one more may begin beside the `begun` that begin now."""
        return len(self._drawings) + begun < self.capacity

    def _tickets(self) -> list[Ticket]:
        return [*self._waiting, *(drawing.ticket for drawing in self._drawings)]

    def _round(self) -> None:
        """Let every drawing go one step on."""
        for drawing in list(self._drawings):
            if drawing.ticket.cancelled:
                self._resume(drawing)
        for group in list(self._groups):
            drawings, error = list(group.drawings), None
            try:
                group.advance()
            except Exception as raised:  # theirs alone: the others go on
                error = raised
            else:
                self._steps += 1
                self._filled += len(drawings)
            for drawing in drawings:
                self._resume(drawing, error)
        for drawing in [drawing for drawing in self._drawings if drawing.seat is None]:
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
            with self._changed:
                self._drawings.remove(drawing)

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
