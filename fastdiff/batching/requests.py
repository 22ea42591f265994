"""Requests for a batch, and the tickets that callers get for them."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from fastdiff.errors import UserError

LARGEST_SEED = 2**64 - 1
OnStep = Callable[[int, int, Any], Any]


class Cancelled(Exception):
    """The request was cancelled before its picture was drawn."""


@dataclass(frozen=True)
class Request:
    """One picture to draw.

    Attributes:
        prompt: what to draw.
        negative_prompt: what not to draw.
        num_inference_steps: steps, at least 1.
        guidance_scale: None: the pipeline's default.
        seed: of the generator (on the CPU) that latents and noise are drawn from, 0 to 2^64 - 1;
            None: another picture each time.
        height, width: in pixels, both or neither; None: the pipeline's own size.
        scheduler: a diffusers scheduler, of which a copy is used; None: the pipeline's.
        output_type: "pil", or "np" for float32 [H, W, 3] from 0 to 1.
        on_step: called after each step as on_step(step, steps, latents), in the batch's thread,
            which waits for it: the number of steps done, the number of all steps, and a copy of the
            latents [1, C, Y, X] in the pipeline's dtype. If it raises, this request ends. Steps are
            calls of the network; some schedulers make more of them than `num_inference_steps`.

    Raises:
        ValueError: a value is not of its type or out of its range.
    """

    prompt: str
    negative_prompt: str | None = None
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    scheduler: Any = None
    output_type: str = "pil"
    on_step: OnStep | None = None

    def __post_init__(self) -> None:
        _check("prompt", self.prompt, isinstance(self.prompt, str), "a string")
        text = self.negative_prompt is None or isinstance(self.negative_prompt, str)
        _check("negative_prompt", self.negative_prompt, text, "a string or None")
        steps = self.num_inference_steps
        _check("num_inference_steps", steps, _whole(steps, 1), "a whole number of at least 1")
        scale = self.guidance_scale
        number = isinstance(scale, int | float) and not isinstance(scale, bool)
        finite = scale is None or (number and math.isfinite(scale))
        _check("guidance_scale", scale, finite, "a finite number or None")
        seed = self.seed is None or (_whole(self.seed, 0) and self.seed <= LARGEST_SEED)
        _check("seed", self.seed, seed, "a whole number from 0 to 2^64 - 1, or None")
        for name, side in (("height", self.height), ("width", self.width)):
            _check(name, side, side is None or _whole(side, 1), "a number of pixels or None")
        both = (self.height is None) == (self.width is None)  # else diffusers ignores the other
        _check("width", self.width, both, "one beside a height, or neither")
        methods = hasattr(self.scheduler, "set_timesteps") and hasattr(self.scheduler, "step")
        usable = self.scheduler is None or (methods and not isinstance(self.scheduler, type))
        _check("scheduler", self.scheduler, usable, "a diffusers scheduler or None")
        kind = self.output_type
        _check("output_type", kind, kind in ("pil", "np"), '"pil" or "np"')
        called = self.on_step is None or callable(self.on_step)
        _check("on_step", self.on_step, called, "a function or None")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check(name: str, value: Any, right: bool, expected: str) -> None:
    if not right:
        raise UserError(f"Request.{name} is {value!r:.100}; expected {expected}")


class Ticket:
    """A request that a batch has accepted. Every method may be called from any thread."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.alone: str | None = None
        """Why the picture was drawn alone, by the compiled pipeline; None if it was drawn in the
        batch, or while that is not known yet."""
        self._future: Future[Any] = Future()
        self._cancelled = threading.Event()

    def result(self, timeout: float | None = None) -> Any:
        """The picture, as the request's `output_type` says; waits for it.

        timeout: in seconds; None: no limit.

        Raises:
            TimeoutError: it is not drawn yet; the request goes on.
            Cancelled: the request was cancelled.
            Exception: the error that drawing this picture raised.
        """
        return self._future.result(timeout)

    def cancel(self) -> None:
        """End the request at its next step; a picture that is drawn already stays."""
        self._cancelled.set()

    def done(self) -> bool:
        """Whether `result` returns, or raises, at once."""
        return self._future.done()

    def add_done_callback(self, function: Callable[["Ticket"], Any]) -> None:
        """Call function(ticket) once it is done, in the batch's thread; at once if it is done."""
        self._future.add_done_callback(lambda _: function(self))

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raise Cancelled if the request was cancelled. For the batch."""
        if self.cancelled:
            raise Cancelled("the request was cancelled")

    def finish(self, picture: Any) -> None:
        """Hand over the picture. For the batch."""
        self._future.set_result(picture)

    def fail(self, error: BaseException) -> None:
        """Hand over an error. For the batch."""
        self._future.set_exception(error)
