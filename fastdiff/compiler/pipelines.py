"""The denoising loop of a pipeline as one plan, within diffusers' own `__call__`.

A plan enters where diffusers asks the pipeline for something just before its first step. Then the
prompt is encoded, the latents are drawn, the timesteps are set, and they lie in its local
variables, under the names by which its callbacks know them. There the plan runs all steps and
writes the result into the latents.

Most loops ask at the top of every step whether they were interrupted: the answer to this and the
following questions is yes. Others open a progress bar around their steps: there they find that no
timesteps are left. So everything before and after the loop stays diffusers', and wherever the plan
does not apply (or a later diffusers asks no longer) diffusers' own loop runs, with our networks
inside. Where a callback does what no plan can follow, the answer is no again from the next step on;
a loop that is entered by its progress bar cannot go on in the middle, so with a callback it is
diffusers'.
"""

import ctypes
import functools
import inspect
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _contextlib

from fastdiff.compiler.begun import call_of
from fastdiff.compiler.denoise import Denoising
from fastdiff.compiler.slot import slot_of
from fastdiff.models import Unsupported
from fastdiff.models.originals import original
from fastdiff.recipes import Recipe, packages_of, recipe_of, recipe_of_class
from fastdiff.runtime.schedulers import NotLinear

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
    """Loops that diffusers ran, in whole or from a step on, by reason."""
    running: int = 0
    """Calls under way."""
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)


@dataclass
class _Entered:
    """A call under way: a variable of our own frame, so it ends with it however that ends."""

    loop: Loop
    given: tuple[Any, ...]
    """What it was called with."""
    asked: bool = False
    passed: int = 0
    """Steps that were run here: diffusers is to pass over them."""


def loop_of(pipe: Any) -> Loop | None:
    """What `pipe` remembers of its loops; None where they are diffusers'."""
    loop: Loop | None = vars(pipe).get(_LOOP)
    return loop


def take_loop(pipe: Any) -> None:
    """Run the loops of `pipe` as plans from now on; it keeps its class's name and its place."""
    recipe = recipe_of(pipe)
    planned = recipe is not None and recipe.plan is not None
    if planned and _theirs(pipe) and loop_of(pipe) is None:
        vars(pipe)[_LOOP] = Loop()
        pipe.__class__ = _planned(_own_class(type(pipe)))


def _theirs(pipe: Any) -> bool:
    """Whether its `__call__` is its library's own."""
    own = _own_class(type(pipe))
    return original(vars(own).get("__call__"), own, "__call__", packages_of(pipe))


def why_not_planned(pipe: Any) -> str:
    """Why the loops of `pipe` are diffusers'."""
    recipe = recipe_of(pipe) or Recipe()
    if recipe.plan is None or slot_of(getattr(pipe, recipe.denoiser, None)) is None:
        return recipe.loop
    if not _theirs(pipe):
        return "its __call__ is not diffusers' own"
    return "its network is compiled, but not this pipeline; compile it, and the loop is a plan"


def release_loop(pipe: Any) -> None:
    """Undo `take_loop`; a call under way keeps the class for as long as it needs it."""
    loop = vars(pipe).pop(_LOOP, None)
    if loop is not None and not loop.running:
        pipe.__class__ = _own_class(type(pipe))


def _own_class(cls: Any) -> Any:
    """The class that a planned one stands for."""
    return vars(cls).get(_LOOP, cls)


@functools.cache
def _planned(own: Any) -> Any:
    """The subclass of a pipeline class that runs its loops as plans."""
    recipe = recipe_of_class(own)
    assert recipe is not None
    plan = recipe.plan
    assert plan is not None
    signature = inspect.signature(own.__call__)
    loop_code = inspect.unwrap(own.__call__).__code__

    @functools.wraps(own.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        loop = loop_of(self)
        if loop is None:  # made by `type(pipe)(...)`, or restored
            return own.__call__(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        if isinstance(given.arguments.get("latents"), Tensor):
            # some pipelines begin with that very tensor; the plan writes its result there
            latents = given.arguments["latents"].clone(memory_format=torch.contiguous_format)
            given.arguments["latents"] = latents
        # a pipeline keeps the state of its call in itself: a second thread waits
        with loop.lock:
            entered = _Entered(loop, tuple(given.arguments.values()))  # `enter` looks for it here
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

    def enter(pipe: Any, frame: FrameType, bar: Any) -> _Entered | None:
        """The call that `frame` is, the plan having run all that it can of it; None for others."""
        entered = _entered(frame, entry.__code__)
        if entered is None:
            _count_stranger(pipe, frame.f_locals)
        elif not entered.asked:
            entered.asked = True
            entered.passed = _run(pipe, entered, frame, bar)
        return entered

    def interrupt(self: Any) -> Any:
        frame = sys._getframe(1)
        if frame.f_code is loop_code:
            try:
                entered = enter(self, frame, frame.f_locals.get("progress_bar"))
            except AttributeError as error:  # from a property it would ask __getattr__ instead
                raise _Carried(error) from error
            if entered is not None and entered.passed and frame.f_locals["i"] < entered.passed:
                return True
        return super(made, self).interrupt

    def progress_bar(self: Any, iterable: Any = None, total: int | None = None) -> Any:
        bar, frame = super(made, self).progress_bar(iterable, total), sys._getframe(1)
        if frame.f_code is loop_code and iterable is None:
            entered = enter(self, frame, bar)
            if entered is not None and entered.passed:
                _leave_none(frame, plan.results)
        return bar

    def reduce(self: Any, protocol: int) -> Any:
        """A copy or pickle is plain diffusers."""
        state = {name: value for name, value in vars(self).items() if name != _LOOP}
        return object.__new__, (own,), state

    members = {
        "__call__": call,
        "__reduce_ex__": reduce,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        _LOOP: own,
    }
    entrances = {"interrupt": property(interrupt), "progress_bar": progress_bar}
    members[plan.entrance] = entrances[plan.entrance]
    made: Any = type(own.__name__, (own,), members)
    return made


def _entered(frame: FrameType, call: CodeType) -> _Entered | None:
    """The call whose loop `frame` runs; None where anything but our own `call` entered it, for that
    may keep the latents, or run the loop twice."""
    caller = frame.f_back
    while caller is not None and caller.f_code.co_filename == _contextlib.__file__:
        caller = caller.f_back
    if caller is None or caller.f_code is not call:
        return None
    entered: _Entered | None = caller.f_locals.get("entered")
    return entered


def _count_stranger(pipe: Any, local: Mapping[str, Any]) -> None:
    loop = loop_of(pipe)
    if loop is not None and local.get("i", 0) == 0:
        loop.own["its __call__ was entered from elsewhere than the compiled pipeline"] += 1


def _leave_none(frame: FrameType, results: Iterable[str]) -> None:
    """Let the loop that `frame` is about to begin find no timesteps, and what its last step leaves
    in variables."""
    local = frame.f_locals
    local["timesteps"] = []
    local.update(dict.fromkeys(results, local["latents"]))
    if sys.version_info < (3, 13):  # where the variables of a frame are a copy
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


def _run(pipe: Any, entered: _Entered, frame: FrameType, bar: Any) -> int:
    """Run the loop that `frame` is about to begin: how many steps are done, which are none where
    diffusers has to run it."""
    loop = entered.loop
    try:
        call = call_of(pipe, frame.f_locals, frame.f_globals, bar)
        if call.callback is not None and _among(call.conditions, entered.given):
            raise Unsupported("a callback may change the embeddings that the call was given")
        denoising = Denoising(pipe, call)
    except (Unsupported, NotLinear) as reason:
        loop.own[str(reason)] += 1
        return 0
    done = denoising.run()
    if denoising.left is None:
        loop.planned += 1
    else:
        loop.own[denoising.left] += 1
    return done


def _among(conditions: Iterable[Any], given: Iterable[Any]) -> bool:
    """Whether a condition is the very tensor that was given."""
    known = {id(value) for value in given if isinstance(value, Tensor)}
    return any(id(condition) in known for condition in conditions)
