"""Records functions of tensors once per shape and replays them: CUDA graphs, or tapes on a CPU.

A new shape costs a recording, never a compilation. Recordings are kept by shape; when they are too
many or too large, the least recently used go first.
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
"""The most recordings kept per function."""
BYTES = 2 << 30
"""The most memory that the recordings of one function may keep. A function that needs more is not
recorded: with activations that large, launches take little of the time."""

Function = Callable[..., Tensor]
T = TypeVar("T")


class Recording(Protocol):
    """A function's kernels on fixed buffers. Run it only within `graphs.in_turn`."""

    @property
    def nbytes(self) -> int:
        """The memory that it keeps."""
        ...

    def run(self) -> Tensor:
        """Compute from the buffers; returns the output, which the next run overwrites."""
        ...


def record(function: Function, buffers: Sequence[Any], searches: bool = True) -> Recording | None:
    """Record `function(*buffers)`. The first buffer is a tensor; the others are trees (see
    `models.hoisted`) of tensors on the same device. All come from `buffer`.

    The function may depend only on the buffers and on weights that stay where they are, and may
    write to the buffers. Recording runs it, so set any state in the buffers afterwards.
    `searches`: as for `runner`.

    Returns:
        None if it cannot be recorded: on another device, while counting, too large.

    Raises:
        torch.OutOfMemoryError: the GPU does not have enough memory.
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
    """The way to call functions on `device`: in the tactics thread if cuDNN `searches` its
    plans."""
    if device.type == graphs.DEVICE and searches and tactics.allowed() and not observed():
        return tactics.run
    return _call


def _call(function: Callable[..., T], *args: Any) -> T:
    return function(*args)


_made = 0


def made() -> int:
    """How many recordings this process has made; only a new size should add any."""
    return _made


def buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that calls in and outside of inference mode may write, and that recordings keep."""
    with torch.inference_mode(False), graphs.allotting(device):
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def kinds(tree: Any) -> Any:
    """The shape, dtype and device of each tensor in `tree`: equal for trees that one recording
    serves. Hashable if the tree is made of tuples."""

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape, value.dtype, value.device
        return value

    return tree_map(kind, tree)


def first_of(rows: Any) -> Any:
    """The first step's part of a tree of tensors [steps, …]."""
    return tree_map(lambda value: value[0] if isinstance(value, Tensor) else value, rows)


def buffers_for(tree: Any, device: torch.device) -> Any:
    """Buffers of zeros in place of the tensors of a tree; other values are kept."""

    def make(value: Any) -> Any:
        return (
            buffer(value.shape, value.dtype, device).zero_() if isinstance(value, Tensor) else value
        )

    return tree_map(make, tree)


def fill(buffers: Sequence[Any], given: Sequence[Any]) -> None:
    """Copy the tensors of a tree's leaves into its buffers; an empty tensor stands for zeros."""
    for own, value in zip(buffers, given, strict=True):
        if isinstance(own, Tensor):
            own.copy_(value) if value.numel() else own.zero_()


class Kept(Generic[T]):
    """Values by key, each made once; the least recently used are dropped first."""

    def __init__(self, nbytes: Callable[[T], int]) -> None:
        self._nbytes = nbytes
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Raises torch.OutOfMemoryError if memory is too small even for this value alone."""
        if key not in self._values:
            try:
                self._values[key] = make()
            except torch.OutOfMemoryError:
                if not self._values:
                    raise
                self._values.clear()
            if key not in self._values:  # here the error no longer holds memory
                self._values[key] = make()
        self._values.move_to_end(key)
        while len(self._values) > 1 and self._too_much():
            self._values.popitem(last=False)
        return self._values[key]

    def _too_much(self) -> bool:
        return len(self._values) > SHAPES or sum(map(self._nbytes, self._values.values())) > BYTES


class Recorded:
    """`function(*trees) -> tensor`, recorded for every shape it is called with.

    The first call with a shape is not recorded, because it may be the only one. Nor are calls that
    cannot be recorded, or calls of a second thread in the meantime.
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
            with suppress(torch.OutOfMemoryError):  # an unrecorded call needs less
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
