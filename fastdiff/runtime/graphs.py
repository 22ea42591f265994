"""CUDA graphs: a function's launches as one, on buffers whose addresses stay.

All graphs of a device share one memory pool, so only one of them may run at a time: `in_turn`
orders them across streams and threads without making the host wait. What a graph has baked in must
last as long as the graph: its activations and the workspaces of cuBLAS lie in the pool, its buffers
are memory of the stream that captures, which nothing else takes except within a turn.
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
"""The type of device that makes graphs."""
T = TypeVar("T")
Runner = Callable[..., Any]
"""Runs a function on arguments, here or in another thread."""


@dataclass
class _Pool:
    """What the graphs of one device share."""

    handle: Any
    """Of the memory."""
    stream: torch.cuda.Stream
    """Where graphs are captured."""
    last: torch.cuda.Event
    """When the graph that was started last will be done with the pool."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    graphs: "WeakSet[Graph]" = field(default_factory=WeakSet)
    """Those in the memory of `handle`."""

    def renew(self) -> None:
        """Take other memory; the graphs in the former go on taking turns with those to come."""
        self.handle, self.graphs = torch.cuda.graph_pool_handle(), WeakSet()


_POOLS: dict[torch.device, _Pool] = {}
_MAKING = threading.Lock()
_FAILED: list[Any] = []
"""Graphs whose capture failed. torch's allocators may go on asking them whose an allocation is."""


class NotCaptured(RuntimeError):
    """A function does what no graph can hold; the message names the operation."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A `Recording` on a GPU."""

    graph: Any
    output: Tensor
    buffers: Sequence[Any]
    """They must outlive the graph."""
    nbytes: int

    def run(self) -> Tensor:
        self.graph.replay()
        return self.output


def capture(
    function: Callable[..., Tensor], buffers: Sequence[Any], most: int, run: Runner
) -> Graph | None:
    """The launches of `function(*buffers)`, which `run` runs.

    Returns:
        None where it takes more than `most` bytes, and where it cannot be captured: with a warning.

    Raises:
        torch.OutOfMemoryError: there is less memory than it takes.
    """
    device = buffers[0].device
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
        pool, current = _pool(device), torch.cuda.current_stream(device)
        pool.stream.wait_stream(current)
        try:
            # in turn: an engine works in memory that its calls on other streams work in, too
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
    """`capture` on the pool's stream. The first call compiles kernels and searches tactics, the
    second finds every choice made and shows what memory it takes."""
    function(*buffers)
    before = _reserved()
    function(*buffers)
    # a graph that turned out too large would leave its memory in the pool for good
    if torch.cuda.memory_reserved() - before > most:
        return None
    before = _reserved()
    if not pool.graphs:  # torch refuses memory whose last graph went while a tensor in it stays
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
    """The launches of `function()` as a torch.cuda.CUDAGraph in the memory pool `handle`, and what
    it returned. It must have run before, or its kernels would be loaded within the capture.

    Whatever happens, streams and allocator are as before. `handle` is spent after an error.

    Raises:
        NotCaptured: it does what no graph can hold.
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
        failed = failed or error  # what ends the capture complains in its own words
        if isinstance(failed, torch.OutOfMemoryError) or not isinstance(failed, RuntimeError):
            raise failed from None
        raise NotCaptured(described(failed)) from failed
    finally:
        failed = None  # else it would keep itself, and what is in its frames, alive
        torch.cuda.set_stream(current)
        _clear_workspaces()


def _clear_workspaces() -> None:
    """Let cuBLAS allocate its workspaces anew: those that it keeps for a stream would be baked into
    the graph while they are freed with other graphs, and those within the pool must stay there."""
    torch._C._cuda_clearCublasWorkspaces()


def _give_up(graph: Any, stream: torch.cuda.Stream, handle: Any) -> None:
    """End a capture that failed, for torch leaves it half ended."""
    torch.cuda.set_stream(stream)
    with suppress(RuntimeError):
        if torch.cuda.is_current_stream_capturing():
            graph.capture_end()
    with suppress(RuntimeError):
        graph.reset()
    _FAILED.append(graph)
    with suppress(RuntimeError):  # it has ended already
        torch._C._cuda_endAllocateToPool(stream.device_index, handle)
        torch._C._cuda_releasePool(stream.device_index, handle)


def described(error: BaseException) -> str:
    """The first line of an error, and the line of code that called torch for it."""
    inside = os.path.dirname(torch.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    ours = list(takewhile(lambda frame: not frame.filename.startswith(inside), frames))
    where = f", in `{ours[-1].line}` ({Path(ours[-1].filename).name})" if ours else ""
    return str(error).splitlines()[0] + where


def _reserved() -> int:
    """Bytes that torch's allocator holds once it has given back what it does not need."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@contextmanager
def in_turn(device: torch.device) -> Iterator[None]:
    """Within it graphs of `device` may run: after all that ran in earlier turns has finished.

    Turns are short and not nested: a step, a call; no callback runs within one.
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
    """An empty turn: what this stream has read is read before later turns, and the reverse."""
    with in_turn(device):
        pass


@contextmanager
def allotting(device: torch.device) -> Iterator[None]:
    """Within it memory is allocated that graphs may read and write for as long as they run.

    It belongs to the stream that captures, so when it is freed nobody is given it before a later
    turn, whichever stream the last graph runs on.
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
