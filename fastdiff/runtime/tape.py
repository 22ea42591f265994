"""A network on a CPU as a straight list of kernel calls on buffers that already exist.

A tape is the CPU's counterpart of a CUDA graph: while it is made, every kernel call is noted with
its addresses; running the tape repeats these calls. On small pictures Python would otherwise spend
a third of each step on finding the same calls again.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.kernels.dispatch import kernel_of
from fastdiff.kernels.observe import recording

TAPE_BYTES = 64 << 20
"""A tape keeps its activations. If they are larger, Python's share of a step is small anyway."""


class _NotTapeable(Exception):
    """The function computes with other than our C++ kernels, or its activations are too large."""


@dataclass(frozen=True)
class Tape:
    """A `Recording` on a CPU."""

    sections: Sequence[Any]
    """Lists of kernel calls, and the other calls `between` them; each has a `run`."""
    output: Tensor
    buffers: Sequence[Any]
    memory: list[NDArray[np.uint8]]
    """The memory that the calls use by address: it must live as long as they do."""

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.memory)

    def run(self) -> Tensor:
        for section in self.sections:
            section.run()
        return self.output


@dataclass(frozen=True)
class _Between:
    """A call that is not a kernel's."""

    run: Callable[[], object]


class _Sections:
    """A tape in the making: a new list of kernel calls begins after each call `between` them."""

    def __init__(self) -> None:
        self.sections: list[Any] = []
        self._open = ExitStack()

    def begin(self) -> None:
        self.sections.append(self._open.enter_context(recording()))

    def add(self, call: Callable[[], object]) -> None:
        self._open.close()
        self.sections.append(_Between(call))
        self.begin()

    def end(self) -> None:
        self._open.close()


_SECTIONS: ContextVar[_Sections | None] = ContextVar("sections", default=None)


def between(call: Callable[[], object]) -> None:
    """`call()`. While this thread records a tape, it does not run; it runs in its place whenever
    the tape does. What it reads and writes must be the tape's own memory."""
    sections = _SECTIONS.get()
    if sections is None:
        call()
    else:
        sections.add(call)


@contextmanager
def _sections() -> Iterator[list[Any]]:
    """Note the kernels that this thread calls in the block, and the calls between them."""
    sections = _Sections()
    sections.begin()
    token = _SECTIONS.set(sections)
    try:
        yield sections.sections
    finally:
        _SECTIONS.reset(token)
        sections.end()


def record(function: Callable[..., Tensor], buffers: Sequence[Any]) -> Tape | None:
    """Record the C++ kernels of `function(*buffers)`; None if anything else computes, too."""
    try:
        # a tape made under inference_mode must also serve calls outside of it
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            _sections() as sections,
            _Memory() as memory,
        ):
            output = function(*buffers)
    except _NotTapeable:
        return None
    return Tape(sections, output, buffers, memory.blocks)


class _Memory(TorchDispatchMode):
    """Allocates the tape's memory; raises on an operation that the tape would miss.

    A block is reused as soon as no tensor refers to it. The tape repeats the calls in the same
    order, so the reuse is safe there, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[NDArray[np.uint8]] = []
        self._free: list[NDArray[np.uint8]] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kernel := kernel_of(op):
            with self:  # this also catches copies that an implementation makes
                return kernel.implementations["cpu"]()(*args, **kwargs)
        if op is torch.ops.aten.new_empty.default:
            like, shape = args
            return self._new(shape, kwargs.get("dtype") or like.dtype)
        result = op(*args, **kwargs)
        if not _is_view(result, args[0]):
            raise _NotTapeable(f"{op} is not one of our kernels")
        return result

    def _new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        fitting = [(block.nbytes, i) for i, block in enumerate(self._free) if size <= block.nbytes]
        if fitting:
            block = self._free.pop(min(fitting)[1])
        else:
            block = _aligned(size)
            self.blocks.append(block)
            if sum(b.nbytes for b in self.blocks) > TAPE_BYTES:
                raise _NotTapeable(f"more than {TAPE_BYTES} bytes of activations")
        part = block[:size]
        weakref.finalize(part, self._free.append, block)  # when the tensor's last view is gone
        return torch.from_numpy(part).view(dtype).view(*shape)


def _aligned(size: int) -> NDArray[np.uint8]:
    """Uninitialised bytes that start on a cache line."""
    raw = np.empty(size + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


def _is_view(result: Any, source: Any) -> bool:
    """Whether all of `result` shares memory with `source`; ops may copy despite their schemas."""
    results = result if isinstance(result, (list, tuple)) else (result,)
    return isinstance(source, Tensor) and all(
        isinstance(part, Tensor)
        and part.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        for part in results
    )
