"""What a Triton kernel loads, stores and computes, counted while Triton's interpreter runs it."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime import interpreter

from fastdiff.kernels.contract import KernelSpec, Launch

ARITHMETIC = {np.add, np.subtract, np.multiply, np.divide, np.exp, np.exp2, np.log, np.log2}
ARITHMETIC |= {np.sqrt, np.sin, np.cos}
ALL_BYTES = 0x0101010101010101


@dataclass
class _Memory:
    """A tensor's storage, kept alive, and which of its bytes were touched."""

    storage: torch.UntypedStorage
    read: np.ndarray = field(init=False)
    written: np.ndarray = field(init=False)

    def __post_init__(self):
        whole = -(-len(self.storage) // 8) * 8  # so that they can be seen as elements of any width
        self.read, self.written = (np.zeros(whole, np.uint8) for _ in range(2))

    @property
    def start(self) -> int:
        return self.storage.data_ptr()

    def touch(self, addresses: np.ndarray, width: int, what: str) -> None:
        """Mark `width` bytes at each of the addresses; all must lie in this storage."""
        offsets = addresses - self.start
        assert 0 <= offsets.min() <= offsets.max() <= len(self.storage) - width, (
            "an access outside of every tensor"
        )
        assert not (offsets & (width - 1)).any(), "an access across two elements"
        getattr(self, what).view(f"u{width}")[offsets // width] = ALL_BYTES >> 64 - 8 * width


@dataclass
class Traffic:
    """What all the launches of an op load, store and compute."""

    products: int = 0
    """FLOPs of `tl.dot`, of whole tiles."""
    arithmetic: int = 0
    """Floating-point operations on tiles: sums, products, quotients, exponentials, roots, erf."""
    idle: int = 0
    """Elements of tiles that were masked off in loads and stores."""
    memory: dict[int, _Memory] = field(default_factory=dict)

    def read(self, tensor: torch.Tensor) -> int:
        """Distinct bytes loaded from a tensor's storage."""
        return self._touched(tensor, "read")

    def written(self, tensor: torch.Tensor) -> int:
        """Distinct bytes stored to a tensor's storage."""
        return self._touched(tensor, "written")

    def _touched(self, tensor, what):
        known = self.memory.get(tensor.untyped_storage().data_ptr())
        return 0 if known is None else np.count_nonzero(getattr(known, what))

    def note(self, pointers, mask, width: int, what: str) -> None:
        mask = np.broadcast_to(mask, pointers.shape)
        addresses = pointers[mask].astype(np.int64)
        self.idle += mask.size - addresses.size
        if not addresses.size:
            return
        starts = sorted(self.memory)
        first, last = (bisect_right(starts, end) - 1 for end in (addresses.min(), addresses.max()))
        if first == last:  # nearly always; a search for each address would double the time
            self.memory[starts[first]].touch(addresses, width, what)
            return
        owners = np.searchsorted(starts, addresses, "right") - 1
        for owner in np.unique(owners):
            self.memory[starts[owner]].touch(addresses[owners == owner], width, what)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what the launches that start in this block do."""
    seen, builder = Traffic(), interpreter.interpreter_builder
    own = {
        name: getattr(builder, name)
        for name in ("create_masked_load", "create_masked_store", "create_dot", "create_erf")
    }
    binary, unary, total = builder.binary_op, builder.unary_op, interpreter.ReduceOps.sum
    start = Launch.start

    def launch(self):
        for value in self.arguments.values():
            if isinstance(value, torch.Tensor) and value.numel():
                storage = value.untyped_storage()
                seen.memory.setdefault(storage.data_ptr(), _Memory(storage))
        start(self)

    def load(pointers, mask, *more):
        width = pointers.get_element_ty().primitive_bitwidth // 8
        seen.note(pointers.data, mask.data, width, "read")
        return own["create_masked_load"](pointers, mask, *more)

    def store(pointers, value, mask, *more):
        width = pointers.get_element_ty().primitive_bitwidth // 8
        seen.note(pointers.data, mask.data, width, "written")
        return own["create_masked_store"](pointers, value, mask, *more)

    def dot(a, b, *more):
        seen.products += 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        return own["create_dot"](a, b, *more)

    def erf(argument):
        seen.arithmetic += argument.data.size
        return own["create_erf"](argument)

    def arithmetic(function):
        def call(*arguments):
            result = function(*arguments)
            # to change a sign, which costs nothing, Triton 3.6 subtracts from zero
            negates = arguments[-1] is np.subtract and not arguments[0].data.any()
            if arguments[-1] in ARITHMETIC and result.dtype.is_floating() and not negates:
                seen.arithmetic += result.data.size
            return result

        return call

    def reduced(self, argument):
        result = total(self, argument)
        seen.arithmetic += argument.handle.data.size - np.size(result.handle.data)
        return result

    replaced = {"create_masked_load": load, "create_masked_store": store, "create_dot": dot}
    replaced |= {"create_erf": erf, "binary_op": arithmetic(binary), "unary_op": arithmetic(unary)}
    with ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(patch.object(builder, name, function))
        stack.enter_context(patch.object(interpreter.ReduceOps, "sum", reduced))
        stack.enter_context(patch.object(Launch, "start", launch))
        yield seen


class Counting:
    """An implementation that counts its last call: `bytes` and `traffic`.

    `bytes` are those of its inputs that it loads and of its outputs that it stores, each once. The
    parts of an output that a later launch reads again, and scratch between launches, are not part
    of an op's minimum traffic.
    """

    bytes: int
    traffic: Traffic

    def __init__(self, spec: KernelSpec, run: Callable[..., Any]) -> None:
        self._spec, self._run = spec, run

    def __call__(self, **inputs: Any) -> Any:
        with counted() as self.traffic:
            returned = self._run(**inputs)
        given = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
        stored = list(returned) if isinstance(returned, tuple) else [returned]
        stored = [*stored, *(inputs[name] for name in self._spec.mutates)]
        sources = {t.untyped_storage().data_ptr(): t for t in given if t.numel()}
        self.bytes = sum(map(self.traffic.read, sources.values()))
        self.bytes += sum(
            map(self.traffic.written, (t for t in stored if t is not None and t.numel()))
        )
        return returned
