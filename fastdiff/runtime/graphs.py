"""CUDA graphs: a function's launches as one, on buffers whose addresses stay.

All graphs of a device share one memory pool, so only one of them may run at a time: `in_turn`
orders them across streams and threads without making the host wait.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_WARM_UPS = 2
"""Calls before a capture: the first compiles kernels, the second finds every choice made."""


@dataclass
class _Pool:
    """What the graphs of one device share."""

    handle: Any
    stream: torch.cuda.Stream
    """Where graphs are captured."""
    last: torch.cuda.Event
    """When the graph that was started last will be done with the pool."""
    lock: threading.Lock = field(default_factory=threading.Lock)


_POOLS: dict[torch.device, _Pool] = {}
_MAKING = threading.Lock()


@dataclass(frozen=True)
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


def capture(function: Callable[..., Tensor], buffers: Sequence[Any]) -> Graph | None:
    """The launches of `function(*buffers)`; None, with a warning, where they cannot be captured."""
    device = buffers[0].device
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
        pool, current = _pool(device), torch.cuda.current_stream(device)
        pool.stream.wait_stream(current)
        # in turn: an engine works in memory that its calls on other streams work in, too
        with torch.cuda.stream(pool.stream), in_turn(device):
            for _ in range(_WARM_UPS):
                function(*buffers)
        current.wait_stream(pool.stream)
        torch.cuda.empty_cache()  # what the warm-ups left would hide what the graph takes
        before = torch.cuda.memory_reserved(device)
        graph = torch.cuda.CUDAGraph()
        captured = torch.cuda.graph(
            graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local"
        )
        try:
            with in_turn(device), captured:
                output = function(*buffers)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own stream behind
            with _MAKING:
                _POOLS.pop(device, None)
            reason = str(error).splitlines()[0]
            warnings.warn(
                f"fastdiff: this shape runs without a CUDA graph: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        grown = max(0, torch.cuda.memory_reserved(device) - before)
    return Graph(graph, output, buffers, grown)


@contextmanager
def in_turn(device: torch.device) -> Iterator[None]:
    """Within it graphs of `device` may run: after all that ran in earlier turns has finished.

    Turns are short and not nested: a step, a call; no callback runs within one.
    """
    if device.type != "cuda":
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


def _pool(device: torch.device) -> _Pool:
    with _MAKING:
        if device not in _POOLS:
            handle, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
            _POOLS[device] = _Pool(handle, stream, torch.cuda.Event())
        return _POOLS[device]
