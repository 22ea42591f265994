"""CUDA graphs: the launches of a function replayed as one, on buffers with fixed addresses.

All graphs of a device share one memory pool, so only one of them may run at a time: `in_turn`
orders them across streams and threads without making the host wait. Memory that a graph refers to
must live as long as the graph. Its activations and cuBLAS's workspaces are in the pool. Its buffers
are allocated on the stream that captures, so no other work gets their memory except in a turn.
"""

import logging
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
DEVICE = "cuda"
"""The device type that supports graphs."""
T = TypeVar("T")
Runner = Callable[..., Any]
"""Calls a function with arguments, in this thread or another."""


@dataclass
class _Pool:
    """The memory, stream and order that the graphs of one device share."""

    handle: Any
    """The handle of the memory pool."""
    stream: torch.cuda.Stream
    """The stream on which graphs are captured."""
    last: torch.cuda.Event
    """Recorded after the latest graph: it no longer uses the pool once this has completed."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    graphs: "WeakSet[Graph]" = field(default_factory=WeakSet)
    """The graphs whose memory is in the pool `handle`."""

    def renew(self) -> None:
        """Switch to a new memory pool; graphs of the former and the new pool still take turns."""
        self.handle, self.graphs = torch.cuda.graph_pool_handle(), WeakSet()


_POOLS: dict[torch.device, _Pool] = {}
_MAKING = threading.Lock()
_FAILED: list[Any] = []
"""Graphs whose capture failed; kept since torch's allocators may still refer to them."""


class NotCaptured(RuntimeError):
    """A function does something that a graph cannot hold; the message names the operation."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A `Recording` on a GPU."""

    graph: Any
    output: Tensor
    buffers: Sequence[Any]
    """Kept here so that they live as long as the graph."""
    nbytes: int

    def run(self) -> Tensor:
        self.graph.replay()
        return self.output


def capture(
    function: Callable[..., Tensor], buffers: Sequence[Any], most: int, run: Runner
) -> Graph | None:
    """Capture the launches of `function(*buffers)`; `run` calls the function.

    Returns:
        None, if it takes more than `most` bytes, or, with a warning, if it cannot be captured.

    Raises:
        torch.OutOfMemoryError: the GPU does not have enough memory.
    """
    device = buffers[0].device
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
        pool, current = _pool(device), torch.cuda.current_stream(device)
        pool.stream.wait_stream(current)
        try:
            # in turn: an engine's work memory is shared with its calls on other streams
            with torch.cuda.stream(pool.stream), in_turn(device):
                return run(_warmed, pool, function, buffers, most)  # type: ignore[no-any-return]
        except NotCaptured as reason:
            logger.warning("fastdiff: this shape runs without a CUDA graph: %s", reason)
            return None
        finally:
            current.wait_stream(pool.stream)


def _warmed(
    pool: _Pool, function: Callable[..., Tensor], buffers: Sequence[Any], most: int
) -> Graph | None:
    """`capture` on the pool's stream. The first call compiles kernels and searches tactics. The
    second shows how much memory it takes once these choices are made."""
    function(*buffers)
    before = _reserved()
    function(*buffers)
    # capture must not find out: a graph that is too large would leave its memory in the pool
    if torch.cuda.memory_reserved() - before > most:
        return None
    before = _reserved()
    if not pool.graphs:  # torch refuses a pool whose last graph is gone but not its tensors
        pool.renew()
    try:
        captures, output = captured(lambda: function(*buffers), pool.stream, pool.handle)
    except BaseException:
        pool.renew()
        raise
    graph = Graph(captures, output, buffers, max(0, torch.cuda.memory_reserved() - before))
    pool.graphs.add(graph)
    return graph if graph.nbytes <= most else None


def captured(function: Callable[[], T], stream: torch.cuda.Stream, handle: Any) -> tuple[Any, T]:
    """The launches of `function()` as a torch.cuda.CUDAGraph in the memory pool `handle`, and the
    function's result. It must have run before; otherwise its kernels are loaded during the capture.

    Streams and allocator are restored in any case. After an error `handle` cannot be used again.

    Raises:
        NotCaptured: the function does something that a graph cannot hold.
        torch.OutOfMemoryError
    """
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    failed: BaseException | None = None
    _clear_workspaces()
    try:
        with torch.cuda.graph(graph, pool=handle, stream=stream, capture_error_mode="thread_local"):
            try:
                return graph, function()
            except BaseException as error:
                failed = error
                raise
    except BaseException as error:
        _give_up(graph, stream, handle)
        failed = failed or error  # ending a failed capture raises another error
        if isinstance(failed, torch.OutOfMemoryError) or not isinstance(failed, RuntimeError):
            raise failed from None
        raise NotCaptured(described(failed)) from failed
    finally:
        failed = None  # else the error and its frames would keep each other alive
        torch.cuda.set_stream(current)
        _clear_workspaces()


def _clear_workspaces() -> None:
    """Make cuBLAS allocate its workspaces again. Otherwise a graph would refer to workspaces of the
    stream that may be freed with other graphs; and those in the pool must stay there."""
    torch._C._cuda_clearCublasWorkspaces()


def _give_up(graph: Any, stream: torch.cuda.Stream, handle: Any) -> None:
    """End a failed capture completely, which torch does only in part."""
    torch.cuda.set_stream(stream)
    with suppress(RuntimeError):
        if torch.cuda.is_current_stream_capturing():
            graph.capture_end()
    with suppress(RuntimeError):
        graph.reset()
    _FAILED.append(graph)
    with suppress(RuntimeError):  # unless it has ended already
        torch._C._cuda_endAllocateToPool(stream.device_index, handle)
        torch._C._cuda_releasePool(stream.device_index, handle)


def described(error: BaseException) -> str:
    """The first line of an error, and the line of our code that led to it."""
    inside = os.path.dirname(torch.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    ours = list(takewhile(lambda frame: not frame.filename.startswith(inside), frames))
    where = f", in `{ours[-1].line}` ({Path(ours[-1].filename).name})" if ours else ""
    return str(error).splitlines()[0] + where


def _reserved() -> int:
    """The bytes that torch's allocator holds after it has released all unused memory."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@contextmanager
def in_turn(device: torch.device) -> Iterator[None]:
    """In this block, graphs of `device` may run: after everything queued in earlier turns.

    A turn is short, such as a step or a call. Turns are not nested and run no callbacks.
    """
    if device.type != DEVICE:
        yield
        return
    pool = _pool(device)
    with pool.lock, torch.cuda.device(device):
        torch.cuda.current_stream().wait_event(pool.last)
        try:
            yield
        finally:
            pool.last.record(torch.cuda.current_stream())


def fence(device: torch.device) -> None:
    """An empty turn: it orders this stream after all earlier turns, and before all later ones."""
    with in_turn(device):
        pass


@contextmanager
def allotting(device: torch.device) -> Iterator[None]:
    """In this block, memory is allocated that graphs may read and write as long as they run.

    It belongs to the capturing stream. So when it is freed, nothing else gets it before a later
    turn, on whichever stream the last graph runs.
    """
    if device.type != DEVICE:
        yield
        return
    with torch.cuda.stream(_pool(device).stream):
        yield
    fence(device)


def _pool(device: torch.device) -> _Pool:
    with _MAKING:
        if device not in _POOLS:
            handle, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
            _POOLS[device] = _Pool(handle, stream, torch.cuda.Event())
        return _POOLS[device]
