"""Functions of tensors, recorded once per shape and then replayed: CUDA graphs, tapes on a CPU.

A new shape costs a recording, never a compilation. What is recorded is kept by shape; what was
unused for longest goes when there is too much of it.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastdiff.kernels.dispatch import NATIVE
from fastdiff.kernels.observe import observed
from fastdiff.runtime import graphs, tactics, tape

SHAPES = 8
"""Recordings kept per function."""
BYTES = 2 << 30
"""Memory of their own that the recordings of one function may keep; one that needs more is not
worth it: where activations are that large, launches are not what takes the time."""

Function = Callable[..., Tensor]
T = TypeVar("T")


class Recording(Protocol):
    """A function's kernels on fixed buffers. Whoever runs it holds `graphs.in_turn`."""

    @property
    def nbytes(self) -> int:
        """Memory that it keeps."""
        ...

    def run(self) -> Tensor:
        """Read the buffers, compute; returns the output's memory, which the next run overwrites."""
        ...


def record(function: Function, buffers: Sequence[Any], searches: bool = True) -> Recording | None:
    """`function(*buffers)` recorded; the first of the buffers is a tensor, the others are trees
    (see `models.hoisted`) of tensors on the same device, from `buffer`.

    It must be a pure function of the buffers, of weights that stay where they are, and of what it
    writes in place. Recording runs it, so state among the buffers must be set afterwards.
    `searches`: as of `runner`.

    Returns:
        None where it can only be called: on another device, under a counter, too large.

    Raises:
        torch.OutOfMemoryError: a GPU has less memory left than it takes.
    """
    global _made
    device = buffers[0].device
    recording: Recording | None = None
    if device.type == graphs.DEVICE:
        recording = graphs.capture(function, buffers, BYTES, runner(device, searches))
    elif device.type == "cpu" and NATIVE is not None:
        recording = tape.record(function, buffers)
    _made += recording is not None
    return recording


def runner(device: torch.device, searches: bool) -> graphs.Runner:
    """What runs a function on `device`: the one thread of tactics where cuDNN `searches` them."""
    if device.type == graphs.DEVICE and searches and tactics.allowed() and not observed():
        return tactics.run
    return _here


def _here(function: Callable[..., T], *args: Any) -> T:
    return function(*args)


_made = 0


def made() -> int:
    """Recordings that this process has made so far: a new size makes some, nothing else may."""
    return _made


def buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that calls in and outside of inference mode may write, and recordings keep."""
    with torch.inference_mode(False), graphs.allotting(device):
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def kinds(tree: Any) -> Any:
    """What a recording that reads `tree` is made for: the same of two trees whose tensors have the
    same shapes, dtypes and devices. Hashable where the tree is made of tuples."""

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape, value.dtype, value.device
        return value

    return tree_map(kind, tree)


def first_of(rows: Any) -> Any:
    """A tree of tensors [steps, …] at the first step."""
    return tree_map(lambda value: value[0] if isinstance(value, Tensor) else value, rows)


def buffers_for(tree: Any, device: torch.device) -> Any:
    """A tree like it of buffers with zeros; what is no tensor in it as it is."""

    def make(value: Any) -> Any:
        return (
            buffer(value.shape, value.dtype, device).zero_() if isinstance(value, Tensor) else value
        )

    return tree_map(make, tree)


def fill(buffers: Sequence[Any], given: Sequence[Any]) -> None:
    """Copy the tensors among a tree's leaves into those of its buffers; one without elements stands
    for zeros."""
    for own, value in zip(buffers, given, strict=True):
        if isinstance(own, Tensor):
            own.copy_(value) if value.numel() else own.zero_()


class Kept(Generic[T]):
    """Values by key, each made once; the least recently used go first."""

    def __init__(self, nbytes: Callable[[T], int]) -> None:
        self._nbytes = nbytes
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Raises torch.OutOfMemoryError where there is too little for this one alone."""
        if key not in self._values:
            try:
                self._values[key] = make()
            except torch.OutOfMemoryError:
                if not self._values:
                    raise
                self._values.clear()
            if key not in self._values:  # now that the error holds no memory any more
                self._values[key] = make()
        self._values.move_to_end(key)
        while len(self._values) > 1 and self._too_much():
            self._values.popitem(last=False)
        return self._values[key]

    def _too_much(self) -> bool:
        return len(self._values) > SHAPES or sum(map(self._nbytes, self._values.values())) > BYTES


class Recorded:
    """`function(*trees) -> tensor` with a recording for every shape it is called with.

    The first call of a shape runs `function` itself, for it may be the only one; so do calls that
    cannot be recorded, and those of a second thread meanwhile.
    """

    def __init__(self, function: Function, searches: bool = True) -> None:
        self.function, self._searches = function, searches
        self._kept: Kept[tuple[Any, Recording] | None] = Kept(
            lambda made: 0 if made is None else made[1].nbytes
        )
        self._seen: set[Hashable] = set()
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Tensor:
        if observed() or not self._lock.acquire(blocking=False):
            return self._plain(*inputs)
        try:
            key = kinds(inputs)
            if key not in self._seen:
                self._seen.add(key)
                return self._plain(*inputs)
            made = None
            with suppress(torch.OutOfMemoryError):  # a call alone takes less
                made = self._kept.get(key, lambda: self._make(inputs))
            if made is None:
                return self._plain(*inputs)
            buffers, recording = made
            with graphs.in_turn(inputs[0].device):
                fill(tree_leaves(buffers), tree_leaves(inputs))
                return recording.run().clone()
        finally:
            self._lock.release()

    def _plain(self, *inputs: Any) -> Tensor:
        output: Tensor = runner(inputs[0].device, self._searches)(self.function, *inputs)
        return output

    def _make(self, inputs: tuple[Any, ...]) -> tuple[Any, Recording] | None:
        buffers = buffers_for(inputs, inputs[0].device)
        recording = record(self.function, buffers, self._searches)
        return None if recording is None else (buffers, recording)
