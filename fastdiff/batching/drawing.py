"""One request's call of the pipeline, paused between its steps.

The pipeline's own `__call__` runs in a greenlet: it encodes the prompt, draws the latents and
enters its loop. There it pauses until the batch has run a step for it, and after the last it goes
on to the autoencoder. So one thread draws all requests, each with diffusers' own code before and
after the loop.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from greenlet import greenlet
from torch import Tensor

from fastdiff.batching.requests import OnStep, Ticket
from fastdiff.compiler.denoise import Denoising
from fastdiff.compiler.loop_state import Driver, loop_of
from fastdiff.compiler.pipelines import take_loop
from fastdiff.recipes import guides_with, recipe_of
from fastdiff.runtime.loop import Plans
from fastdiff.runtime.places import Places, Seat, of_each, seat_of


class _Alone(Exception):
    """The batch cannot run this request's steps; the message says why."""

    def __init__(self, reason: str, driver: Driver | None = None) -> None:
        """driver: runs the steps instead; None: only diffusers can."""
        super().__init__(reason)
        self.driver = driver


class _Paused:
    """The `Driver` of a loop that is drawn alone, on its plan, a step each time."""

    def __init__(self, pause: OnStep) -> None:
        self._pause = pause

    def run(self, denoising: Denoising) -> int:
        """Run the loop's steps. Returns their number."""
        return denoising.run(self._pause)

    def refuse(self, reason: str) -> None:
        """The loop is not a plan."""
        raise _Alone(reason)


class Drawing:
    """A request that is being drawn: the `Driver` of its own pipeline's loop."""

    def __init__(self, ticket: Ticket, pipe: Any, own: Mapping[str, Any]) -> None:
        """pipe: the compiled pipeline, of which this draws with a copy that shares its networks.
        own: components of this thread, in place of the pipeline's."""
        self.ticket, self._pipe, self._own = ticket, pipe, own
        self.seat: Seat | None = None
        """The picture, while its next step is the batch's to run."""
        self.plans: Plans | None = None
        """The loops of the network that predicts its steps."""
        self.noise: Tensor | None = None
        """The noise that the scheduler draws for the next step, as the network packs it."""
        self.places: Places | None = None
        """Where the batch has put the picture."""
        self.place = 0
        self._texts: list[Any] = []
        """What the pipeline's encodings of the prompts returned, in their order."""
        self._greenlet = greenlet(self._draw)

    def resume(self, error: BaseException | None = None) -> bool:
        """Go on until the next step is the batch's to run or was run alone. Returns whether the
        request is still being drawn; `error` ends it."""
        if error is None:
            self._greenlet.switch()
        else:
            self._greenlet.throw(error)
        return not self._greenlet.dead

    def _draw(self) -> None:
        driver: Driver | None = self
        while not self.ticket.done():
            try:
                picture = self._call(driver)
            except _Alone as alone:
                self.ticket.alone, driver = str(alone), alone.driver
            except BaseException as error:
                self.ticket.fail(error)
            else:
                self.ticket.finish(picture)

    def _call(self, driver: Driver | None) -> Any:
        self.ticket.check()
        request, pipe = self.ticket.request, copy.copy(self._pipe)
        chosen = pipe.scheduler if request.scheduler is None else request.scheduler
        vars(pipe).update({**self._own, "scheduler": copy.deepcopy(chosen)})
        if hasattr(pipe, "encode_prompt"):
            vars(pipe)["encode_prompt"] = self._encoding(pipe.encode_prompt)
        pipe.set_progress_bar_config(disable=True)
        recipe = recipe_of(pipe)
        whole = loop_of(self._pipe)
        assert whole is not None
        # the batch sees to that itself
        invariant = whole.invariant and driver is not self
        take_loop(pipe, recipe.networks if recipe else (), None, invariant)
        loop = loop_of(pipe)
        assert loop is not None
        loop.ran, loop.own, loop.driver = whole.ran, whole.own, driver
        told: dict[str, Any] = {}
        takes = inspect.signature(type(pipe).__call__).parameters
        if driver is None and "callback_on_step_end" in takes:
            told["callback_on_step_end"] = self._callback
        for name in ("negative_prompt", "height", "width"):
            if (value := getattr(request, name)) is not None:
                told[name] = value
        if request.guidance_scale is not None:
            told[guides_with(takes) or "guidance_scale"] = request.guidance_scale
        generator = torch.Generator()
        generator.seed() if request.seed is None else generator.manual_seed(request.seed)
        return pipe(
            prompt=request.prompt,
            num_inference_steps=request.num_inference_steps,
            generator=generator,
            output_type=request.output_type,
            **told,
        ).images[0]

    def _encoding(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """`encode_prompt` for one call of the pipeline: a second call, which begins anew because
        the batch cannot run its steps, finds what the first one encoded."""
        kept = iter([*self._texts])

        def encode_once(*args: Any, **kwargs: Any) -> Any:
            for texts in kept:
                return texts
            self._texts.append(encode(*args, **kwargs))
            return self._texts[-1]

        return encode_once

    def run(self, denoising: Denoising) -> int:
        """Have the batch run the loop's steps. Returns their number."""
        call, network = denoising.call, denoising.predictor.denoiser.network
        if reason := _obstacle(denoising):
            return self._run_alone(denoising, reason)
        table, steps = denoising.table, len(call.timesteps)
        given, timesteps, sides = denoising.predictor.told(0, denoising.given)
        plans = self.plans = denoising.predictor.denoiser.plans
        own = of_each(network, given, timesteps, sides, denoising.hoisted, plans.own)
        if own is None:
            why = "its conditions do not show which of them belong to each picture"
            return self._run_alone(denoising, why)
        guidance = denoising.predictor.guidance()
        seat = seat_of(network, call.latents, table, guidance, denoising.hoisted, own)
        denoising.predictor.ran(steps)

        def latents() -> Tensor:
            assert self.places is not None
            unpacked: Tensor = network.unpack(self.places.sample(self.place), sides)
            return unpacked.to(call.latents.dtype, copy=True)

        try:
            while seat.at < steps:
                self.noise = None
                if table.draws[seat.at]:
                    self.noise = network.pack(denoising.draw_noise())
                self.seat = seat
                self._pause()
                self._report(seat.at, steps, latents)
            result = latents()
        finally:
            self.seat = None
        if not result.isfinite().all():
            if network.dtype == torch.float16:
                raise self._alone("float16 overflowed")
            raise ArithmeticError(
                f"the latents are not finite after {steps} steps of"
                f" {type(denoising.scheduler).__name__}"
            )
        vars(denoising.scheduler).update(table.states[-1])
        denoising.hand_over(result)
        return steps

    def refuse(self, reason: str) -> None:
        """The loop is not a plan: diffusers draws it."""
        raise _Alone(reason)

    def _alone(self, reason: str) -> _Alone:
        return _Alone(reason, _Paused(self._after_step))

    def _run_alone(self, denoising: Denoising, reason: str) -> int:
        """Run this loop's steps, and those of the call's later loops, on their own plans. Returns
        the number of steps."""
        alone, whole, loop = self._alone(reason), loop_of(self._pipe), loop_of(denoising.pipe)
        assert whole is not None
        assert loop is not None
        assert alone.driver is not None
        if whole.invariant:  # this loop was prepared for the batch, which sees to that itself
            raise alone
        self.ticket.alone, loop.driver = reason, alone.driver
        return alone.driver.run(denoising)

    def _pause(self) -> None:
        """Return when it is this request's turn again; raises Cancelled if it was cancelled."""
        parent = self._greenlet.parent
        assert parent is not None
        parent.switch()
        self.ticket.check()

    def _report(self, done: int, steps: int, latents: Callable[[], Tensor]) -> None:
        if self.ticket.request.on_step is not None:
            self.ticket.request.on_step(done, steps, latents())

    def _after_step(self, done: int, steps: int, latents: Tensor) -> None:
        """Called after each step of a picture that is drawn alone."""
        self._report(done, steps, lambda: latents)
        self._pause()

    def _callback(self, pipe: Any, i: int, _: Any, told: dict[str, Any]) -> dict[str, Any]:
        """The callback of a call whose loop is diffusers'."""
        self._after_step(i + 1, pipe.num_timesteps, told["latents"].clone())
        return {}


def _obstacle(denoising: Denoising) -> str | None:
    """Why a batch cannot run the steps of a plan, if so."""
    call, predictor = denoising.call, denoising.predictor
    if len(call.latents) != 1:
        return "it draws several pictures at once"
    if denoising.inpainting is not None:
        return "it keeps a part of a picture"
    return predictor.shared_steps()
