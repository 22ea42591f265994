"""A stand-in for the CUDA runtime below torch: tensors and kernels are a CPU's, the rules a GPU's.

Every torch op and every kernel of ours goes through a dispatch mode, which tracks what a GPU would
do: on which stream the op runs, which memory it touches, whether a capture can record it. Ops are
computed at once, so results are right in any order; clocks check the order itself. These raise an
error:

- in a capture: waiting for the GPU, copying from or to the host, allocating outside the graph's
  pool, the first load of a kernel, cuDNN's search, waiting for an event from outside the capture;
- anywhere: two streams that touch the same memory, one of them writing, with no order between them;
  replaying a graph whose memory or cuBLAS workspace was freed; more memory than there is.

A capture computes nothing (what it allocates holds NaN), and records other memory by its address. A
failed capture ends halfway, as in torch. Freed memory is used again on the same stream.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from fastdiff.compiler import transforms
from fastdiff.kernels import conv2d
from fastdiff.kernels.conv2d import cudnn
from fastdiff.kernels.dispatch import KERNELS
from fastdiff.runtime import graphs, loop, recordings, tactics

WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "geglu"}
"""Ops that cuBLAS computes, for which it needs a workspace."""
WORKSPACE = 1 << 10

Clock = dict[int, int]
"""For each stream, by id, how many of its launches have completed."""


def later(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, 0), time)


class Stream:
    """torch.cuda.Stream."""

    _ids = count()

    def __init__(self, device: Any = None) -> None:
        self.id, self.device_index = next(self._ids), 0
        self.clock: Clock = {}
        self.capture: CUDAGraph | None = None

    def tick(self) -> Clock:
        """The clock of the next launch, which comes after everything the host has waited for."""
        later(self.clock, GPU.host)
        self.clock[self.id] = self.clock.get(self.id, 0) + 1
        return self.clock

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        if self.capture is not None and event.clock and event.within is not self.capture:
            GPU.refuse("a capture waits for an event from outside of it")
        if event.within is not None and event.within is not self.capture:
            raise RuntimeError("stand-in: a stream waits for an event of a capture")
        later(self.clock, event.clock)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        GPU.wait(self.clock)

    def query(self) -> bool:
        if self.capture is not None:
            GPU.refuse("a query")
        GPU.thread.context = True
        return False


class Event:
    """torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.clock: Clock = {}
        self.within: CUDAGraph | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or GPU.current
        self.clock, self.within = dict(stream.clock), stream.capture

    def synchronize(self) -> None:
        GPU.wait(self.clock)

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


@dataclass
class Memory:
    """A block of the GPU's memory, and the launches that have touched it."""

    nbytes: int
    stream: Stream
    """The stream whose allocations may use it again once it is free."""
    alive: Callable[[], bool]
    wrote: Clock = field(default_factory=dict)
    """Stream and time of the last write."""
    read: Clock = field(default_factory=dict)
    """Streams and times of the reads since then."""

    def touch(self, stream: Stream, what: str, writes: bool) -> None:
        before = self.wrote | self.read if writes else self.wrote
        for other, time in before.items():
            if stream.clock.get(other, 0) < time:
                does = "writes" if writes else "reads"
                raise RuntimeError(
                    f"stand-in: a race: {what} on stream {stream.id} {does} what stream {other}"
                    " may still be using"
                )
        if writes:
            self.wrote, self.read = {stream.id: stream.clock[stream.id]}, {}
        else:
            self.read[stream.id] = stream.clock[stream.id]


@dataclass
class Pool:
    """The memory that graphs share."""

    stream: Stream
    used_by: int = 0
    largest: int = 0
    """Bytes of the largest capture; the other captures use the same bytes."""
    tensors: list[StorageWeakRef] = field(default_factory=list)
    """What captures allocated; some of it may still be held."""

    def __post_init__(self) -> None:
        self.memory = Memory(0, self.stream, lambda: True)
        """The whole pool, which every replay of a graph writes."""

    def held(self) -> bool:
        return not all(weak.expired() for weak in self.tensors)


@dataclass
class Node:
    """A launch within a graph."""

    op: Any
    args: Any
    kwargs: Any
    fresh: list[tuple[int, Tensor]]
    """The tensors that it allocated, each with the number of its output."""

    def run(self) -> None:
        leaves = tree_leaves(self.op(*self.args, **self.kwargs))
        for i, kept in self.fresh:
            kept.copy_(leaves[i])


class CUDAGraph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.gpu = GPU
        self.nodes: list[Node] = []
        self.touched: dict[int, tuple[Memory, bool]] = {}
        """Memory outside of the pool, and whether the graph writes it."""
        self.workspaces: list[Memory] = []
        self.took = 0
        self.failed = self.ended = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        self.pool_id, self.stream = pool or torch.cuda.graph_pool_handle(), GPU.current
        if self.stream is GPU.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        if self.stream.capture is not None or self.pool_id in GPU.underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.pool = GPU.pools.setdefault(self.pool_id, Pool(self.stream))
        if self.pool.used_by == 0 and self.pool.held():
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.pool.used_by += 1
        GPU.underway[self.pool_id] = self
        self.stream.capture = GPU.thread.capturing = self

    def capture_end(self) -> None:
        if GPU.current is not self.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        self.stream.capture = GPU.thread.capturing = None
        if self.failed:
            raise RuntimeError("CUDA error: operation failed due to a previous error in capture")
        del GPU.underway[self.pool_id]
        self.ended = True

    def note(self, op: Any, args: Any, kwargs: Any, written: list[Tensor], given: Any) -> Any:
        """Record a launch: nothing is computed, and what it allocates lies in the pool."""
        saved = [(tensor, tensor.clone()) for tensor in written]
        out = op(*args, **kwargs)
        for tensor, before in saved:
            tensor.copy_(before)
        new = GPU.fresh(given, out)
        if tree_leaves(out) and not new and not written:
            return out  # a view
        for _, tensor in new:
            self.took += tensor.untyped_storage().nbytes()
            self.pool.largest = max(self.pool.largest, self.took)
            GPU.make_room(0)
            GPU.known[tensor.untyped_storage()._cdata] = (
                StorageWeakRef(tensor.untyped_storage()),
                (self.pool.memory),
            )
            self.pool.tensors.append(StorageWeakRef(tensor.untyped_storage()))
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        for tensor in given:
            memory = GPU.memory_of(tensor)
            if memory is not None and memory is not self.pool.memory:
                writes = any(tensor is one for one in written)
                before = self.touched.get(id(memory), (memory, False))[1]
                self.touched[id(memory)] = memory, before or writes
        args, kwargs = tree_map(self._baked, (args, kwargs))
        self.nodes.append(Node(op, args, kwargs, new))
        return out

    def _baked(self, value: Any) -> Any:
        """A tensor that knows only the address of its memory, unless it lies in the pool."""
        if not isinstance(value, Tensor) or GPU.memory_of(value) in (None, self.pool.memory):
            return value
        storage = value.untyped_storage()
        address = (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr())
        bare = torch.frombuffer(address, dtype=torch.uint8).untyped_storage()
        alias = torch.empty(0, dtype=value.dtype)
        return alias.set_(bare, value.storage_offset(), value.shape, value.stride())

    def replay(self) -> None:
        stream = GPU.current
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        with GPU.lock, _disable_current_modes():
            used = [*self.workspaces, *(memory for memory, _ in self.touched.values())]
            if not all(memory.alive() for memory in used):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            stream.tick()
            self.pool.memory.touch(stream, "a graph", writes=True)
            for memory, writes in self.touched.values():
                memory.touch(stream, "a graph", writes)
            for node in self.nodes:
                node.run()

    def reset(self) -> None:
        if self.ended:
            self.gpu.clear_workspaces(self.stream)
            self.gpu.release_pool(0, self.pool_id)
        self.ended, self.nodes = False, []

    def __del__(self) -> None:
        self.reset()


class Mode(TorchDispatchMode):
    """Shows the stand-in what a thread launches."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with GPU.lock:
            return GPU.launch(op, args, kwargs or {})


class Gpu:
    """The state of the runtime; `GPU` is the one in use."""

    def __init__(self) -> None:
        self.lock, self.thread = threading.RLock(), threading.local()
        self.thread.context = True
        self.default = Stream()
        self.host: Clock = {}
        """The launches that the host knows to be complete."""
        self.known: dict[int, tuple[StorageWeakRef, Memory]] = {}
        """The memory of each storage."""
        self.free: list[Memory] = []
        self.pools: dict[Any, Pool] = {}
        self.underway: dict[Any, CUDAGraph] = {}
        """The captures that the allocator still gives memory to, by pool."""
        self.workspaces: dict[tuple[int, int], Memory] = {}
        """cuBLAS workspaces, by thread and stream."""
        self.loaded: set[Any] = set()
        self.hosted: list[StorageWeakRef] = []
        self.capacity = 1 << 62
        self.warns = "default"
        self.searches: list[Any] = []
        """The convolutions for which cuDNN searched for a plan, in order."""

    @property
    def current(self) -> Stream:
        return getattr(self.thread, "stream", self.default)

    @property
    def capturing(self) -> CUDAGraph | None:
        """The graph that this thread captures."""
        return getattr(self.thread, "capturing", None)

    def refuse(self, what: str) -> None:
        """Make this thread's capture fail."""
        assert self.capturing is not None
        self.capturing.failed = True
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")

    def wait(self, clock: Clock | None = None) -> None:
        """The host waits, by default for everything."""
        if self.capturing is not None:
            self.refuse("the host waits")
        if self.warns == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        clocks = [clock] if clock is not None else [m.wrote | m.read for m in self._memories()]
        for one in clocks:
            later(self.host, one)

    def on_host(self, tensor: Tensor) -> Tensor:
        """Mark a tensor as one in the host's memory."""
        self.hosted.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def launch(self, op: Any, args: Any, kwargs: Any) -> Any:
        stream, capture = self.current, self.current.capture
        namespace, _, name = op._schema.name.partition("::")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        by_name = {
            a.name: a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments
        }
        values = dict(zip(by_name, args, strict=False)) | kwargs
        written = [
            t for n, v in values.items() if by_name[n] for t in tree_leaves(v) if t is not None
        ]
        if self.capturing is not None:
            if self.capturing.failed:
                raise RuntimeError("CUDA error: operation failed due to a previous error")
            if any(self._hosted(tensor) for tensor in given):
                self.refuse("a copy from or to the host")
        if name in WAITS:
            self.wait(stream.clock)
        kernel = (name, *((tensor.shape, tensor.dtype) for tensor in given))
        if namespace == "fastdiff" and kernel not in self.loaded:
            if self.capturing is not None:
                self.refuse(f"the kernel {name} is loaded")
            self.loaded.add(kernel)
        if namespace == "fastdiff" and not getattr(self.thread, "context", False):
            raise RuntimeError("Triton Error [CUDA]: invalid device context")
        self.thread.context = True
        if name in PRODUCTS:
            self._use_workspace(stream)
        if capture is not None:
            if capture is not self.capturing:
                raise RuntimeError("stand-in: another thread launches into a capture")
            return capture.note(op, args, kwargs, written, given)
        out = op(*args, **kwargs)
        new = [tensor for _, tensor in self.fresh(given, out)]
        if new and self.capturing is not None:
            self.refuse("memory outside of the graph's pool")
        for tensor in new:
            self._allot(tensor, stream)
        if name.removeprefix("new_").startswith("empty") or (
            any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)) and not new and not written
        ):
            return out  # nothing runs
        stream.tick()
        for tensor in [*given, *new]:
            memory = self.memory_of(tensor)
            if memory is not None:
                memory.touch(stream, name, writes=any(tensor is t for t in (*written, *new)))
        return out

    @staticmethod
    def fresh(given: list[Tensor], out: Any) -> list[tuple[int, Tensor]]:
        """The outputs whose memory is new, with their numbers."""
        old = {tensor.untyped_storage()._cdata for tensor in given}
        leaves = enumerate(tree_leaves(out))
        tensors = ((i, leaf) for i, leaf in leaves if isinstance(leaf, Tensor))
        return [(i, t) for i, t in tensors if t.untyped_storage()._cdata not in old]

    def memory_of(self, tensor: Tensor) -> Memory | None:
        """The block that a tensor lies in; None for an empty one."""
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return None
        known = self.known.get(storage._cdata)
        if known is None or known[0].expired():  # made before the stand-in was in use
            self._remember(tensor, self.default, None)
        return self.known[storage._cdata][1]

    def _remember(self, tensor: Tensor, stream: Stream, former: Memory | None) -> None:
        storage = tensor.untyped_storage()
        weak = StorageWeakRef(storage)
        memory = Memory(storage.nbytes(), stream, lambda: not weak.expired())
        if former is not None:
            memory.nbytes, memory.wrote, memory.read = former.nbytes, former.wrote, former.read
        self.known[storage._cdata] = weak, memory

    def _allot(self, tensor: Tensor, stream: Stream) -> None:
        """Allocate a tensor's memory: a free block of its stream where one is large enough."""
        need = tensor.untyped_storage().nbytes()
        if (
            need == 0
            or self.known.get(tensor.untyped_storage()._cdata, (None,))[0] is not None
            and (not self.known[tensor.untyped_storage()._cdata][0].expired())
        ):
            return
        self._sweep()
        fits = [m for m in self.free if m.stream is stream and m.nbytes >= need]
        former = min(fits, key=lambda memory: memory.nbytes, default=None)
        if former is None:
            self.make_room(need)
        else:
            self.free.remove(former)
        self._remember(tensor, stream, former)

    def make_room(self, need: int) -> None:
        held = self.reserved()
        if held + need > self.capacity and self.capturing is None:
            self.empty_cache()
            held = self.reserved()
        if held + need > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory. The stand-in is full")

    def _sweep(self) -> None:
        """Find the memory that was freed."""
        pooled = {id(pool.memory) for pool in self.pools.values()}
        expired = torch.UntypedStorage._expired  # weak.expired() calls it by way of two functions
        for key, (weak, memory) in list(self.known.items()):
            if expired(weak.cdata):
                del self.known[key]
                if id(memory) not in pooled:
                    self.free.append(memory)

    def _memories(self) -> list[Memory]:
        pools = [pool.memory for pool in self.pools.values()]
        return [*pools, *self.free, *self.workspaces.values(), *(m for _, m in self.known.values())]

    def reserved(self, device: Any = None) -> int:
        """torch.cuda.memory_reserved."""
        self._sweep()
        pooled = sum(pool.largest for pool in self.pools.values())
        return pooled + sum(memory.nbytes for memory in self._memories())

    def empty_cache(self) -> None:
        if self.capturing is not None:
            self.refuse("memory is given back")
        self._sweep()
        for memory in self.free:
            later(self.host, memory.wrote | memory.read)
        self.free.clear()
        unused = [key for key, pool in self.pools.items() if not pool.used_by and not pool.held()]
        for key in unused:
            del self.pools[key]

    def _use_workspace(self, stream: Stream) -> None:
        key = threading.get_ident(), stream.id
        capture = stream.capture
        if key not in self.workspaces:
            freed: list[bool] = []
            memory = Memory(WORKSPACE, stream, lambda: not freed)
            memory.freed = freed  # type: ignore[attr-defined]
            if capture is not None:
                memory = capture.pool.memory
            self.workspaces[key] = memory
        if capture is not None:
            capture.workspaces.append(self.workspaces[key])

    def clear_workspaces(self, stream: Stream | None = None) -> None:
        """torch._C._cuda_clearCublasWorkspaces for this thread, or for one stream."""
        for key, memory in list(self.workspaces.items()):
            mine = key[0] == threading.get_ident() if stream is None else key[1] == stream.id
            if mine:
                del self.workspaces[key]
                if hasattr(memory, "freed"):
                    memory.freed.append(True)
                    self.free.append(memory)

    def end_allocate(self, device: int, pool: Any) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        del self.underway[pool]

    def release_pool(self, device: int, pool: Any) -> None:
        self.pools[pool].used_by -= 1

    def _hosted(self, tensor: Tensor) -> bool:
        keys = {weak.cdata for weak in self.hosted if not weak.expired()}
        return StorageWeakRef(tensor.untyped_storage()).cdata in keys

    def convolution(self, x: Tensor, weight: Tensor, **flags: Any) -> Tensor:
        """torch.cudnn_convolution with ATen's cache of plans, whose key is the thread and all flags
        but `benchmark`. Every plan adds in its own order, so every plan gives other last bits."""
        search = flags.pop("benchmark")
        key = (x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), *flags.items())
        plans = vars(self.thread).setdefault("plans", {})
        if key not in plans and search:
            self.wait(self.current.clock)
            self.searches.append(key)
            plans[key] = len(self.searches)
        plan = plans.setdefault(key, 0)
        y = F.conv2d(x, weight, None, flags["stride"], flags["padding"])
        return y.mul_(1 + plan * 2.0**-22)

    def run(self, function: Callable[..., Any], *args: Any) -> threading.Thread:
        """Start a thread that runs `function`."""

        def work() -> None:
            with Mode():
                function(*args)

        thread = threading.Thread(target=work)
        thread.start()
        return thread


class StreamContext:
    """torch.cuda.stream. If it is never left, as after a failed capture, it restores nothing."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self.before = GPU.current
        set_stream(self.stream or self.before)

    def __exit__(self, *_: object) -> None:
        set_stream(self.before)


def set_stream(stream: Stream) -> None:
    GPU.thread.stream = stream


def set_sync_debug_mode(mode: str) -> None:
    GPU.warns = mode


GPU = Gpu()


@contextmanager
def standing_in(patch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """In this block CPU tensors count as a GPU's. At its end no capture may be left open."""
    global GPU
    GPU = Gpu()
    handles = count(1)
    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "stream": StreamContext,
        "set_stream": set_stream,
        "current_stream": lambda device=None: GPU.current,
        "default_stream": lambda device=None: GPU.default,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=132),
        "device": lambda device: nullcontext(),
        "synchronize": lambda device=None: GPU.wait(),
        "empty_cache": lambda: GPU.empty_cache(),
        "memory_reserved": lambda device=None: GPU.reserved(),
        "graph_pool_handle": lambda: (0, next(handles)),
        "is_current_stream_capturing": lambda: GPU.current.capture is not None,
        "set_sync_debug_mode": set_sync_debug_mode,
        "get_sync_debug_mode": lambda: GPU.warns,
    }.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: GPU.clear_workspaces(), raising=False
    )
    patch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda d, p: GPU.end_allocate(d, p), raising=False
    )
    patch.setattr(torch._C, "_cuda_releasePool", lambda d, p: GPU.release_pool(d, p), raising=False)
    patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    patch.setattr(torch, "cudnn_convolution", lambda x, w, **flags: GPU.convolution(x, w, **flags))
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(cudnn, "SEARCHED", {})
    patch.setattr(conv2d, "_op", KERNELS["conv2d"].library)
    patch.setattr(graphs, "DEVICE", "cpu")
    patch.setattr(graphs, "_POOLS", {})
    patch.setattr(graphs, "_FAILED", [])
    for module in (transforms, recordings, loop):
        patch.setattr(module, "observed", lambda: torch._C._len_torch_dispatch_stack() > 1)
    searcher = ThreadPoolExecutor(1, initializer=lambda: Mode().__enter__())
    patch.setattr(tactics, "_THREAD", searcher)
    try:
        with Mode():
            yield GPU
    finally:
        searcher.shutdown()
    assert not GPU.underway, "a capture was left open"
