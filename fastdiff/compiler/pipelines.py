"""Runs a pipeline's denoising loop as one plan, inside diffusers' own `__call__`.

The plan enters where diffusers reads something from the pipeline just before its first step. By
then the prompt is encoded, the latents are drawn and the timesteps are set. They are in local
variables of `__call__`, under the names that callbacks use. The plan runs all steps and writes the
result into the latents.

Most loops read `interrupt` at the top of every step. The plan runs at the first such read; from
then on the property is True, so diffusers skips its own steps. Other loops open a progress bar
around their steps, or over the timesteps; for them, the plan runs there and leaves no timesteps.
If one call has several loops, each has a plan, identified by the timesteps of its progress bar.
Everything before and after the loop stays with diffusers. If the plan does not apply (or a later
diffusers no longer reads `interrupt`) diffusers' own loop runs, with our networks in it. If a
callback does something that no plan can follow, `interrupt` is False again from the next step on. A
loop entered by its progress bar cannot resume in mid-loop, so if it has a callback, diffusers runs
it.
"""

import ctypes
import functools
import inspect
import sys
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _contextlib
from torch.utils._pytree import tree_leaves

from fastdiff.compiler.denoise import Denoising
from fastdiff.compiler.loop_call import call_of
from fastdiff.compiler.loop_state import PLACE, Loop
from fastdiff.compiler.loop_state import loop_of as loop_of
from fastdiff.compiler.sharing import Sharing
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.models import Unsupported
from fastdiff.models.originals import original
from fastdiff.plans import Plan
from fastdiff.recipes import Recipe, packages_of, recipe_of, recipe_of_class
from fastdiff.runtime.schedulers import NotLinear


class _Carried(Exception):
    """Carries an AttributeError out of a property."""

    def __init__(self, error: AttributeError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class _Entered:
    """A call in progress. It is a local variable of our `call`, so it disappears with its frame."""

    loop: Loop
    given: tuple[Any, ...]
    """The arguments of the call."""
    begun: set[str] = field(default_factory=set)
    """The networks whose loops have begun."""
    passed: int = 0
    """Steps of the last one that its plan ran, which diffusers must skip."""


def take_loop(
    pipe: Any, compiled: Container[str], sharing: Sharing | None = None, invariant: bool = False
) -> None:
    """Run the loops of `pipe` that repeat a compiled component as plans from now on; the object and
    its class name stay the same.

    sharing: with other ranks. invariant: `Options.batch_invariant`.
    """
    if plannable(pipe, compiled) and loop_of(pipe) is None:
        vars(pipe)[PLACE] = Loop(sharing=sharing, invariant=invariant)
        pipe.__class__ = _planned(_own_class(type(pipe)))


def plannable(pipe: Any, compiled: Container[str]) -> bool:
    """Whether `pipe` has a loop that repeats a compiled component and may run as a plan."""
    plans = (recipe_of(pipe) or Recipe()).plans
    return any(plan.network in compiled for plan in plans) and _theirs(pipe)


def _theirs(pipe: Any) -> bool:
    """Whether its `__call__` is its library's own."""
    own = _own_class(type(pipe))
    return original(vars(own).get("__call__"), own, "__call__", packages_of(pipe))


def why_not_planned(pipe: Any) -> str:
    """Why diffusers runs the loops of `pipe`."""
    recipe = recipe_of(pipe) or Recipe()
    if all(slot_of(getattr(pipe, plan.network, None)) is None for plan in recipe.plans):
        return recipe.loop
    if not _theirs(pipe):
        return "its __call__ is not diffusers' own"
    return "its network is compiled, but this pipeline is not; compile it to put the loop on a plan"


def release_loop(pipe: Any) -> None:
    """Undo `take_loop`; a call in progress keeps the planned class until it ends."""
    loop = vars(pipe).pop(PLACE, None)
    if loop is not None and not loop.running:
        pipe.__class__ = _own_class(type(pipe))


def _own_class(cls: Any) -> Any:
    """The pipeline class that a planned class is made from."""
    return vars(cls).get(PLACE, cls)


@functools.cache
def _planned(own: Any) -> Any:
    """A subclass of a pipeline class that runs its loops as plans."""
    recipe = recipe_of_class(own)
    assert recipe is not None
    plans = recipe.plans
    signature = inspect.signature(own.__call__)
    loop_code = inspect.unwrap(own.__call__).__code__

    @functools.wraps(own.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        loop = loop_of(self)
        if loop is None:  # a new object of this class, or a restored one
            return own.__call__(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        for name in {plan.latents for plan in plans} & given.arguments.keys():
            # some pipelines use this very tensor as their latents; the plan overwrites those
            if isinstance(latents := given.arguments[name], Tensor):
                own_memory = latents.clone(memory_format=torch.contiguous_format)
                given.arguments[name] = own_memory
        # a pipeline stores the state of its call in itself: a second thread has to wait
        with loop.lock:
            entered = _Entered(loop, tuple(given.arguments.values()))  # `_call_in` finds it here
            loop.running += 1
            try:
                return own.__call__(*given.args, **given.kwargs)
            except _Carried as carried:
                raise carried.error from None
            finally:
                loop.running -= 1
                if not loop.running and loop_of(self) is None and type(self) is made:
                    self.__class__ = own
                del entered

    entry: Any = call

    def enter(
        pipe: Any, plan: Plan, frame: FrameType, bar: Any, timesteps: Tensor | None = None
    ) -> int:
        """Run the plan at the first read in `frame`; returns how many steps diffusers must skip."""
        entered = _call_in(frame, entry.__code__)
        if entered is None:
            _count_foreign_call(pipe, frame.f_locals)
            return 0
        if plan.network not in entered.begun:
            entered.begun.add(plan.network)
            entered.passed = _run(pipe, plan, entered, frame, bar, timesteps)
        return entered.passed

    def interrupt(self: Any) -> Any:
        frame = sys._getframe(1)
        if frame.f_code is loop_code:
            try:
                passed = enter(self, plans[0], frame, frame.f_locals.get("progress_bar"))
            # raised in a property, it would make Python try __getattr__
            except AttributeError as error:
                raise _Carried(error) from error
            if passed and frame.f_locals["i"] < passed:
                return True
        return super(made, self).interrupt

    def progress_bar(self: Any, iterable: Any = None, total: int | None = None) -> Any:
        bar, frame = super(made, self).progress_bar(iterable, total), sys._getframe(1)
        found = _begins(plans, frame, iterable) if frame.f_code is loop_code else None
        if found is None or not enter(self, found, frame, bar, iterable):
            return bar
        if found.iterates:
            bar.close()
            return iter(())
        _skip_loop(frame, found)
        return bar

    def reduce(self: Any, protocol: int) -> Any:
        """Copies and pickles are plain diffusers pipelines."""
        state = {name: value for name, value in vars(self).items() if name != PLACE}
        return object.__new__, (own,), state

    members = {
        "__call__": call,
        "__reduce_ex__": reduce,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        PLACE: own,
    }
    entrances = {"interrupt": property(interrupt), "progress_bar": progress_bar}
    members |= {plan.entrance: entrances[plan.entrance] for plan in plans}
    made: Any = type(own.__name__, (own,), members)
    return made


def _begins(plans: Iterable[Plan], frame: FrameType, iterable: Any) -> Plan | None:
    """The plan of the loop around which, or over whose timesteps, `frame` opens a progress bar."""
    for plan in plans:
        alone = not plan.timesteps or frame.f_locals.get(plan.timesteps) is iterable
        if plan.iterates == (iterable is not None) and alone:
            return plan
    return None


def _call_in(frame: FrameType, call: CodeType) -> _Entered | None:
    """The call whose loop `frame` runs; None if anything but our own `call` called it, since a
    stranger may keep the latents, or run the loop twice."""
    caller = frame.f_back
    while caller is not None and caller.f_code.co_filename == _contextlib.__file__:
        caller = caller.f_back
    if caller is None or caller.f_code is not call:
        return None
    entered: _Entered | None = caller.f_locals.get("entered")
    return entered


def _count_foreign_call(pipe: Any, local: Mapping[str, Any]) -> None:
    loop = loop_of(pipe)
    if loop is not None and local.get("i", 0) == 0:
        loop.own["its __call__ was called by something other than the compiled pipeline"] += 1


def _skip_loop(frame: FrameType, plan: Plan) -> None:
    """Set the loop's timesteps to none, and the variables that its last step would set to the
    result."""
    local = frame.f_locals
    local["timesteps"] = []
    local.update(dict.fromkeys(plan.results, local[plan.latents]))
    if sys.version_info < (3, 13):  # there, f_locals is a copy
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


def _run(
    pipe: Any,
    plan: Plan,
    entered: _Entered,
    frame: FrameType,
    bar: Any,
    timesteps: Tensor | None,
) -> int:
    """Run the loop that `frame` is about to begin; return how many steps are done, 0 if diffusers
    has to run it."""
    loop = entered.loop
    try:
        call = call_of(pipe, plan, frame.f_locals, frame.f_globals, bar, timesteps)
        told = (*call.conditions, *tree_leaves([*call.handed.values()]))
        if call.callback is not None and _includes_any(told, entered.given):
            raise Unsupported("a callback may change the embeddings that were passed to the call")
        denoising = Denoising(pipe, call, loop.sharing, loop.invariant)
    except (Unsupported, NotLinear) as reason:
        loop.finished(ran=False)
        why = _told(pipe, plan, str(reason))
        if loop.invariant:
            raise UserError(f"Options.batch_invariant cannot draw this call: {why}") from reason
        if loop.driver is not None:
            loop.driver.refuse(why)
        loop.own[why] += 1
        return 0
    done = denoising.run() if loop.driver is None else loop.driver.run(denoising)
    loop.finished(ran=True)
    if denoising.left is None:
        loop.ran[plan.network] += 1
    else:
        loop.own[denoising.left] += 1
    return done


def _told(pipe: Any, plan: Plan, reason: str) -> str:
    """The reason why diffusers runs a loop, with the loop's name if there are several."""
    recipe = recipe_of(pipe)
    several = recipe is not None and len(recipe.plans) > 1
    return f"{plan.network}: {reason}" if several else reason


def _includes_any(conditions: Iterable[Any], given: Iterable[Any]) -> bool:
    """Whether one of `conditions` is the same object as a tensor in `given`."""
    known = {id(value) for value in given if isinstance(value, Tensor)}
    return any(id(condition) in known for condition in conditions)
