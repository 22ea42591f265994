"""The peak memory of one backend, though all backends are in one process.

On a GPU: the memory that torch reserves while a picture is drawn, minus what it reserved before the
backend was made. Reserved, not allocated, because nothing else can use a CUDA graph's pool although
it counts as free.

On a CPU: the tensors that the backend keeps (weights, packed copies), plus the most that were alive
on top of them while a picture was drawn, as torch's profiler saw its allocator. Memory that a
library allocates for itself is not counted. The resident set would include it, but it also depends
on what earlier backends left in the heap.

For an engine on a CPU, whose memory torch does not see: the process's largest growth since before
the engine was made, without mapped files (Linux can drop their pages), plus the weights of the
pipeline's parts that do not run on an engine.
"""

import ctypes
import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Baseline:
    """The memory in use before a backend: bytes reserved on the GPU, addresses of CPU storages, and
    bytes of the process that belong to no file (None if Linux does not report them)."""

    reserved: int
    storages: frozenset[int]
    process: int | None = None


def baseline(device: torch.device) -> Baseline:
    """The present state; call before a backend's pipeline is copied or moved to `device`."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return Baseline(torch.cuda.memory_reserved(device), frozenset())
    free_heap()
    status = _status()
    process = status["VmRSS"] - status["RssFile"] if status else None
    return Baseline(0, frozenset(_alive()), process)


def free_heap() -> None:
    """Return free heap memory of the C library to the system, if it supports that."""
    with suppress(AttributeError, OSError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def engine_peak_bytes(
    pipe: Any, before: Baseline, draw: Callable[[], object], replaced: Sequence[Any]
) -> int | None:
    """Bytes at the peak of one warm `draw()` on a CPU, with engines in place of the modules
    `replaced`; None if Linux does not report it."""
    gc.collect()
    free_heap()
    try:
        (_PROCESS / "clear_refs").write_text("5")  # resets the peak
    except OSError:
        return None
    draw()
    status = _status()
    if not status or before.process is None:
        return None
    grown = max(0, status["VmHWM"] - status["RssFile"] - before.process)
    apart = {at for module in replaced for at in _storages(_tensors(module))}
    shared = {at: size for at, size in _own(pipe).items() if at in before.storages - apart}
    return grown + sum(shared.values())


_PROCESS = Path("/proc/self")


def _status() -> dict[str, int]:
    """Bytes by Linux's names of memory (VmHWM is the peak of VmRSS); empty on other systems."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
        told = (line.split() for line in lines if line.endswith(" kB"))
        return {words[0].rstrip(":"): 1024 * int(words[1]) for words in told}
    except (OSError, ValueError):
        return {}


def peak_bytes(pipe: Any, before: Baseline, draw: Callable[[], object]) -> int:
    """The bytes of `pipe`'s backend at the peak of one warm `draw()`."""
    gc.collect()
    if pipe.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(pipe.device)
        draw()
        return int(torch.cuda.max_memory_reserved(pipe.device) - before.reserved)
    held = {at: size for at, size in _alive().items() if at not in before.storages} | _own(pipe)
    return sum(held.values()) + _peak_of_temporaries(draw)


def _own(pipe: Any) -> dict[int, int]:
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return _storages(tensor for module in modules for tensor in _tensors(module))


def _tensors(module: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    return (*module.parameters(), *module.buffers())


def _alive() -> dict[int, int]:
    # compare exact types: fake tensors are not memory, and isinstance would load lazy modules
    kinds = (torch.Tensor, torch.nn.Parameter)
    return _storages(item for item in gc.get_objects() if type(item) in kinds)


def _storages(tensors: Any) -> dict[int, int]:
    """Address and bytes of each distinct CPU storage of `tensors`."""
    storages = (
        tensor.untyped_storage()
        for tensor in tensors
        if tensor.device.type == "cpu" and tensor.layout == torch.strided
    )
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _peak_of_temporaries(draw: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        draw()
    now = peak = 0
    kineto: Any = trace.profiler
    for event in kineto.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
