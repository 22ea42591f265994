"""A network on a CPU as one straight run of kernel calls on buffers that are already there.

What a CUDA graph is to a GPU: the first call for a shape notes every kernel with the addresses it
was given, later calls copy the inputs in and run the notes. On small pictures a third of a step is
otherwise Python finding out again what it found out the step before.
"""

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.kernels.dispatch import KERNELS, NATIVE, Call, recording

TAPE_BYTES = 64 << 20
"""A tape keeps its activations. Where they are larger, Python's share of a step is small anyway."""
TAPES = 8
"""Shapes remembered per network; the one unused for longest goes first."""


class _NotTapeable(Exception):
    """Something other than our C++ kernels computes here, or the activations are too large."""


@dataclass(frozen=True)
class _Tape:
    inputs: tuple[Tensor, ...]
    output: Tensor
    calls: list[Call]
    memory: list[NDArray[np.uint8]]
    """What the calls read and write by address: it must outlive them."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        for kernel, arguments in self.calls:
            kernel(*arguments)
        return self.output.clone()


class Tapes:
    """`function` with a tape for every shape it is called with.

    It must be a pure function of its tensors and of weights that stay where they are. Calls that
    cannot be taped, and those of a second thread meanwhile, run `function` itself.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self._tapes: OrderedDict[Any, _Tape | None] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Tensor:
        if NATIVE is None or inputs[0].device.type != "cpu":
            return self.function(*inputs)
        if not self._lock.acquire(blocking=False):
            return self.function(*inputs)
        try:
            key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
            if key not in self._tapes:
                self._tapes[key] = _record(self.function, inputs)
                while len(self._tapes) > TAPES:
                    self._tapes.popitem(last=False)
            self._tapes.move_to_end(key)
            tape = self._tapes[key]
            return self.function(*inputs) if tape is None else tape(*inputs)
        finally:
            self._lock.release()


def _record(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> _Tape | None:
    try:
        # a tape made under inference_mode must serve calls outside of it, too
        with torch.inference_mode(False), torch.no_grad():
            own = tuple(torch.empty(t.shape, dtype=t.dtype).copy_(t) for t in inputs)
            with recording() as calls, _Memory() as memory:
                output = function(*own)
    except _NotTapeable:
        return None
    return _Tape(own, output, calls, memory.blocks)


class _Memory(TorchDispatchMode):
    """Gives out memory that the tape owns; raises where a tape of our kernels would miss an op.

    A block is given out again once nothing refers to what it held: the order of calls that made
    that safe is the order in which the tape runs them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[NDArray[np.uint8]] = []
        self._free: list[NDArray[np.uint8]] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if op.namespace == "fastdiff":
            name = op._schema.name.removeprefix("fastdiff::")
            with self:  # a copy that an implementation makes for itself would be missed, too
                return KERNELS[name].implementations["cpu"]()(*args, **kwargs)
        if op is torch.ops.aten.new_empty.default:
            return self._new(*args)
        result = op(*args, **kwargs)
        if not _is_view(result, args[0]):
            raise _NotTapeable(f"{op} is none of our kernels")
        return result

    def _new(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape) * like.element_size()
        fitting = [(block.nbytes, i) for i, block in enumerate(self._free) if size <= block.nbytes]
        if fitting:
            block = self._free.pop(min(fitting)[1])
        else:
            block = _aligned(size)
            self.blocks.append(block)
            if sum(b.nbytes for b in self.blocks) > TAPE_BYTES:
                raise _NotTapeable(f"more than {TAPE_BYTES} bytes of activations")
        part = block[:size]
        weakref.finalize(part, self._free.append, block)  # when the last view of the tensor goes
        return torch.from_numpy(part).view(like.dtype).view(*shape)


def _aligned(size: int) -> NDArray[np.uint8]:
    """Uninitialised bytes that begin a cache line."""
    raw = np.empty(size + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


def _is_view(result: Any, source: Any) -> bool:
    """Whether all of `result` is memory of `source`; schemas promise it and copy all the same."""
    results = result if isinstance(result, (list, tuple)) else (result,)
    return isinstance(source, Tensor) and all(
        isinstance(part, Tensor)
        and part.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        for part in results
    )
