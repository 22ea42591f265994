"""Observes calls: kernels, for a tape or a counter; named blocks; and named entry points."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fastdiff.kernels.dispatch import NATIVE

T = TypeVar("T")


@contextmanager
def recording() -> Iterator[Any]:
    """Record the C++ kernels that this thread calls in the block on a tape; they also run.

    `tape.run()` runs them again on the same addresses, without Python between them.
    """
    tape = NATIVE.Tape()
    tape.start()
    try:
        yield tape
    finally:
        tape.stop()


_CALLED: ContextVar[list[str] | None] = ContextVar("called", default=None)


@contextmanager
def counting() -> Iterator[list[str]]:
    """Collect the names of the C++ kernels that this thread calls in the block; they do not run.

    Networks then run call by call under the counter's dispatch mode, as without one.
    """

    def noting(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            called = _CALLED.get()
            if called is None:  # another thread
                function(*args)
            else:
                called.append(name)

        return call

    native = {} if NATIVE is None else vars(NATIVE)
    plain = {name: native[name] for name in native.get("KERNELS", ())}
    called: list[str] = []
    token = _CALLED.set(called)
    native.update({name: noting(name, function) for name, function in plain.items()})
    try:
        yield called
    finally:
        native.update(plain)
        _CALLED.reset(token)


def observed() -> bool:
    """Whether a dispatch mode sees this thread's calls: then no recording may replace them."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_counting() -> bool:
    """Whether this thread is within `counting`: then no recording may replace calls."""
    return _CALLED.get() is not None


@dataclass
class _Watch:
    told: Callable[[str], object]
    block: str = ""


_WATCH: ContextVar[_Watch | None] = ContextVar("watch", default=None)
_UNWATCHED: AbstractContextManager[None] = nullcontext()


@contextmanager
def watching(told: Callable[[str], object]) -> Iterator[None]:
    """Call `told(block)` whenever this thread changes blocks; "" outside of all blocks."""
    token = _WATCH.set(_Watch(told))
    try:
        yield
    finally:
        _WATCH.reset(token)


def scope(block: str) -> AbstractContextManager[None]:
    """Name the calls in this block for `watching`; the innermost name counts.

    It takes a quarter of a microsecond if nobody watches, and nothing when a recording is replayed.
    """
    watch = _WATCH.get()
    return _UNWATCHED if watch is None else _within(watch, block)


Entering = Callable[[str, Callable[[], Any]], Any]
"""(name, call) -> the result in place of `call()`."""

_ENTERING: ContextVar[Entering | None] = ContextVar("entering", default=None)


@contextmanager
def entering(handler: Entering) -> Iterator[None]:
    """In this block, the handler decides how often this thread's `entered` calls run."""
    token = _ENTERING.set(handler)
    try:
        yield
    finally:
        _ENTERING.reset(token)


def entered(name: str, call: Callable[[], T]) -> T:
    """`call()`, through the handler of `entering` if there is one."""
    handler = _ENTERING.get()
    if handler is None:
        return call()
    made: T = handler(name, call)
    return made


@contextmanager
def _within(watch: _Watch, block: str) -> Iterator[None]:
    outer, watch.block = watch.block, block
    watch.told(block)
    try:
        yield
    finally:
        watch.block = outer
        watch.told(outer)
