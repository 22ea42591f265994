"""Peak memory of one backend, though all of them live in one process.

On a GPU: the memory torch reserves while a picture is drawn, less what it reserved before the
backend was made. Reserved, not allocated: the pool of a CUDA graph is nobody else's to use, yet
counts as free among the allocated.

On a CPU: the tensors that the backend keeps (weights, packed copies) and the most that were alive
on top of them while a picture was drawn, as torch's profiler saw its allocator. What a library
takes for itself is not in it; the resident set would be, but it also depends on what the backends
before it left in the heap.

Of an engine on a CPU, whose memory torch does not see: by how much the process grew at most since
before the engine was made, files that it maps apart (Linux can drop their pages), and the weights
of the parts of the pipeline that no engine stands for.
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
    """What was there before: bytes reserved on the GPU, addresses of the CPU's storages, bytes of
    the process that are no file's (None where Linux does not tell)."""

    reserved: int
    storages: frozenset[int]
    process: int | None = None


def baseline(device: torch.device) -> Baseline:
    """Call before a backend's pipeline is copied or moved to `device`."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return Baseline(torch.cuda.memory_reserved(device), frozenset())
    free_heap()
    status = _status()
    process = status["VmRSS"] - status["RssFile"] if status else None
    return Baseline(0, frozenset(_alive()), process)


def free_heap() -> None:
    """Give the system back what is free in the C library's heap, where that can be asked for it."""
    with suppress(AttributeError, OSError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def engine_peak_bytes(
    pipe: Any, before: Baseline, draw: Callable[[], object], replaced: Sequence[Any]
) -> int | None:
    """Bytes at the peak of one warm `draw()` on a CPU whose engines stand for the modules
    `replaced`; None where Linux does not tell."""
    gc.collect()
    free_heap()
    try:
        (_PROCESS / "clear_refs").write_text("5")  # the peak begins anew
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
    """Bytes by Linux' names of memory: VmHWM is the peak of VmRSS; empty where it has none."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
        told = (line.split() for line in lines if line.endswith(" kB"))
        return {words[0].rstrip(":"): 1024 * int(words[1]) for words in told}
    except (OSError, ValueError):
        return {}


def peak_bytes(pipe: Any, before: Baseline, draw: Callable[[], object]) -> int:
    """Bytes at the peak of one warm `draw()` that belong to `pipe`'s backend."""
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
    # By exact type: fake tensors are not memory, and asking a lazy module for its class loads it.
    kinds = (torch.Tensor, torch.nn.Parameter)
    return _storages(item for item in gc.get_objects() if type(item) in kinds)


def _storages(tensors: Any) -> dict[int, int]:
    """Address and bytes of the distinct CPU storages under `tensors`."""
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
