"""The batch: a thread that owns a pipeline and draws what it is asked for."""

import atexit
import copy
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.batching.requests import Request, Ticket
from fastdiff.compiler.pipelines import loop_of, take_loop
from fastdiff.errors import UserError
from fastdiff.recipes import recipe_of


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

    def __init__(self, pipe: Any, capacity: int = 4) -> None:
        if loop_of(pipe) is None:
            raise UserError(
                f"Batch was given a {type(pipe).__name__} whose loop is diffusers' own; give a"
                " pipeline that fastdiff.compile has made fast"
            )
        if type(capacity) is not int or capacity < 1:
            raise UserError(f"Batch's capacity is {capacity!r}; give how many pictures, as 4")
        self.pipe, self.capacity = pipe, capacity
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._active = self._steps = self._filled = 0
        self._closed = False
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
            return Stats(self._active, len(self._waiting), self._steps, self._filled)

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
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                ticket, self._active = self._waiting.popleft(), 1
                if self._closed and not self._draining:
                    ticket.cancel()
            try:
                picture = self._draw(ticket)
            except BaseException as error:
                ticket.fail(error)
            else:
                ticket.finish(picture)
            with self._changed:
                self._active = 0

    def _draw(self, ticket: Ticket) -> Any:
        ticket.check()
        request, pipe = ticket.request, copy.copy(self.pipe)
        # of the copy's class, which is diffusers'
        recipe = recipe_of(pipe)
        take_loop(pipe, recipe.networks if recipe else ())
        chosen = pipe.scheduler if request.scheduler is None else request.scheduler
        vars(pipe)["scheduler"] = copy.deepcopy(chosen)
        pipe.set_progress_bar_config(disable=True)

        def after(pipe: Any, step: int, timestep: Any, told: dict[str, Any]) -> dict[str, Any]:
            self._steps += 1
            self._filled += 1
            ticket.check()
            if self._closed and not self._draining:
                ticket.cancel()
            if request.on_step is not None:
                request.on_step(step + 1, len(pipe.scheduler.timesteps), told["latents"].clone())
            return {}

        seed = torch.seed() if request.seed is None else request.seed
        asked = {
            "negative_prompt": request.negative_prompt,
            "guidance_scale": request.guidance_scale,
            "height": request.height,
            "width": request.width,
        }
        return pipe(
            request.prompt,
            num_inference_steps=request.num_inference_steps,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=after,
            **{name: value for name, value in asked.items() if value is not None},
        ).images[0]
