"""Looking at what is called: kernels onto a tape or into a count, blocks, whole entrances."""

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
    """A tape of the C++ kernels that this thread calls within it; they run all the same.

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
    """Names of the C++ kernels that this thread calls within it. They compute nothing.

    Networks then run under a dispatch mode of the counter as they run without one, call by call.
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
    """Whether a dispatch mode looks at this thread's calls: no recording may stand for them."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_counting() -> bool:
    """Whether this thread is within `counting`: then nothing recorded may stand for calls."""
    return _CALLED.get() is not None


@dataclass
class _Watch:
    told: Callable[[str], object]
    block: str = ""


_WATCH: ContextVar[_Watch | None] = ContextVar("watch", default=None)
_UNWATCHED: AbstractContextManager[None] = nullcontext()


@contextmanager
def watching(told: Callable[[str], object]) -> Iterator[None]:
    """`told(block)` at each border between this thread's blocks; "" outside of all of them."""
    token = _WATCH.set(_Watch(told))
    try:
        yield
    finally:
        _WATCH.reset(token)


def scope(block: str) -> AbstractContextManager[None]:
    """Names what this thread calls within it, for whoever is `watching`; the innermost name counts.

    Unwatched it takes a quarter of a microsecond, and nothing where a recording is replayed.
    """
    watch = _WATCH.get()
    return _UNWATCHED if watch is None else _within(watch, block)


Entering = Callable[[str, Callable[[], Any]], Any]
"""(name, call) -> what stands for `call()`."""

_ENTERING: ContextVar[Entering | None] = ContextVar("entering", default=None)


@contextmanager
def entering(handler: Entering) -> Iterator[None]:
    """Within it this thread's calls of `entered` are the handler's to make, repeat or leave out."""
    token = _ENTERING.set(handler)
    try:
        yield
    finally:
        _ENTERING.reset(token)


def entered(name: str, call: Callable[[], T]) -> T:
    """`call()`, by way of whoever is `entering`."""
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
