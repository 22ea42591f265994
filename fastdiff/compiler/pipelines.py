"""The denoising loop of a pipeline as one plan, within diffusers' own `__call__`.

At the top of every step diffusers asks the pipeline whether it was interrupted. When it asks for
the first time the prompt is encoded, the latents are drawn, the timesteps are set, and they lie in
its local variables, under the names by which its callbacks know them. There the plan runs all
steps, writes the result into the latents, and the answer to this and the following questions is
yes. So everything before and after the loop stays diffusers', and wherever the plan does not apply
(or a later diffusers asks no longer) diffusers' own loop runs, with our networks inside.
"""

import functools
import inspect
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from fastdiff.compiler.denoise import Call, Denoising
from fastdiff.compiler.fits import refuse
from fastdiff.models import Unsupported
from fastdiff.runtime.hoist import Conditions
from fastdiff.runtime.schedulers import NotLinear

PLANNED = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
)
"""Pipelines whose step is nothing but the U-Net, guidance and the scheduler."""

_LOCALS = (
    *("latents", "prompt_embeds", "timestep_cond", "timesteps", "extra_step_kwargs"),
    *("progress_bar", "num_warmup_steps"),
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)
"""Variables of diffusers' `__call__` that a plan is made from."""


_LOOP = "_fastdiff_loop"


class _Carried(Exception):
    """Brings an AttributeError through a property."""

    def __init__(self, error: AttributeError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class Loop:
    """What a planned pipeline remembers."""

    planned: int = 0
    """Loops that ran as a plan since compile."""
    own: Counter[str] = field(default_factory=Counter)
    """Loops that diffusers ran, by reason."""
    skip: bool = False
    """Whether the loop under way has been run: diffusers is to pass over its steps."""
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)


def loop_of(pipe: Any) -> Loop | None:
    """What `pipe` remembers of its loops; None where they are diffusers'."""
    loop: Loop | None = vars(pipe).get(_LOOP)
    return loop


def take_loop(pipe: Any) -> None:
    """Run the loops of `pipe` as plans from now on; it keeps its class's name and its place."""
    own: Any = type(pipe)
    theirs = {own.__module__.split(".")[0], own.__call__.__module__.split(".")[0]} == {"diffusers"}
    if own.__name__ in PLANNED and theirs and loop_of(pipe) is None:
        vars(pipe)[_LOOP] = Loop()
        pipe.__class__ = _planned(own)


def release_loop(pipe: Any) -> None:
    """Undo `take_loop`."""
    if vars(pipe).pop(_LOOP, None) is not None:
        pipe.__class__ = type(pipe).__bases__[0]


@functools.cache
def _planned(own: Any) -> Any:
    """The subclass of a pipeline class that runs its loops as plans."""

    signature = inspect.signature(own.__call__)

    @functools.wraps(own.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        loop = vars(self)[_LOOP]
        given = signature.bind(self, *args, **kwargs)
        if isinstance(given.arguments.get("latents"), Tensor):
            # some pipelines begin with that very tensor; the plan writes its result there
            latents = given.arguments["latents"].clone(memory_format=torch.contiguous_format)
            given.arguments["latents"] = latents
        # a pipeline keeps the state of its call in itself: a second thread waits
        with loop.lock:
            before, loop.skip = loop.skip, False
            try:
                return own.__call__(*given.args, **given.kwargs)
            except _Carried as carried:
                raise carried.error from None
            finally:
                loop.skip = before

    def interrupt(self: Any) -> bool:
        loop, frame = vars(self)[_LOOP], sys._getframe(1)
        local = frame.f_locals if frame.f_code.co_name == "__call__" else {}
        if local.get("self") is self and local.get("i") == 0 and not loop.skip:
            try:
                loop.skip = _run(self, loop, local)
            except AttributeError as error:  # from a property it would ask __getattr__ instead
                raise _Carried(error) from error
        return bool(loop.skip or own.interrupt.fget(self))

    def reduce(self: Any, protocol: int) -> Any:
        """A copy or pickle is plain diffusers."""
        state = {name: value for name, value in vars(self).items() if name != _LOOP}
        return object.__new__, (own,), state

    members = {
        "__call__": call,
        "interrupt": property(interrupt),
        "__reduce_ex__": reduce,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
    }
    return type(own.__name__, (own,), members)


def _run(pipe: Any, loop: Loop, local: Mapping[str, Any]) -> bool:
    """Run the loop that `local` is about to begin; False where diffusers has to."""
    try:
        denoising = Denoising(pipe, _call(local))
    except (Unsupported, NotLinear) as reason:
        loop.own[str(reason)] += 1
        return False
    denoising.run()
    loop.planned += 1
    return True


def _call(local: Mapping[str, Any]) -> Call:
    """The loop that is about to begin, from the local variables of diffusers' `__call__`."""
    missing = [name for name in _LOCALS if name not in local]
    if missing:
        raise Unsupported(f"this version of diffusers has no {missing[0]} in its loop")
    callback = local["callback_on_step_end"]
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        raise Unsupported(f"a {type(callback).__name__} may change anything between the steps")
    if callback is not None and local["callback_on_step_end_tensor_inputs"] != ["latents"]:
        raise Unsupported("callback_on_step_end asks for more than the latents")
    refuse(callback=local.get("callback"))
    return Call(
        latents=local["latents"],
        conditions=Conditions(
            text=local["prompt_embeds"],
            text_embeds=local.get("add_text_embeds"),
            time_ids=local.get("add_time_ids"),
            timestep_cond=local["timestep_cond"],
            image_embeds=local.get("image_embeds"),
        ),
        timesteps=local["timesteps"],
        step_options=local["extra_step_kwargs"],
        bar=local["progress_bar"],
        warm_up=local["num_warmup_steps"],
        callback=callback,
    )
