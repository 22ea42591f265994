"""Refuses a picture that does not fit in memory, before the system kills the process."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastdiff.errors import UserError
from fastdiff.recipes import denoiser, factor_of

TOLD = (
    *("can't allocate memory", "not enough memory", "out of memory"),
    *("ALLOC_FAILED", "bad_alloc", "overflowed"),
)
"""Words by which errors of torch, ONNX Runtime and OpenVINO report a lack of memory."""
MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


@contextmanager
def room(pipe: Any, height: int, width: int, device: str) -> Iterator[None]:
    """Draw in this block; sizes in pixels. UserError if memory is too small: at once if a single
    layer needs more than is free, else when torch requests more."""
    asked = f"--width {width} and --height {height}"
    free = None if device.startswith("cuda") else available()
    if free is not None and (need := least(pipe, height, width)) > free:
        raise UserError(
            f"{asked} need at least {_size(need)} of memory, but only {_size(free)} are free; draw"
            " fewer pixels"
        )
    try:
        with _limit(free):
            yield
    except UserError:
        raise
    except Exception as error:  # other runtimes raise their own classes
        if not wants_memory(error):
            raise
        raise UserError(
            f"{asked} need more memory than there is on {device}; draw fewer pixels, or close"
            " other programs"
        ) from error


def wants_memory(error: BaseException) -> bool:
    """Whether an error was raised because memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in TOLD)


def least(pipe: Any, height: int, width: int) -> int:
    """Bytes that one layer of the first block reads and writes, with guidance: a convolution of a
    U-Net, a product of a transformer."""
    net, factor = denoiser(pipe), factor_of(pipe)
    config = net.config
    if "block_out_channels" in config:
        width_of, patch = int(config.block_out_channels[0]), 1
    else:
        heads = config.get("num_attention_heads", 1), config.get("attention_head_dim", 1)
        width_of = config.get("dim") or heads[0] * heads[1]
        patch = config.get("patch_size") or 1
    numbers = 2 * width_of * (height // factor // patch) * (width // factor // patch)
    return 2 * numbers * int(net.dtype.itemsize)


def available() -> int | None:
    """Bytes that this process can still allocate, given swap and its cgroup's limit; None if
    unknown."""
    try:
        lines = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
        free = 1024 * sum(int(lines[key].split()[0]) for key in ("MemAvailable", "SwapFree"))
    except (OSError, ValueError, KeyError):
        return None
    try:
        most, used = (int((GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no cgroup, or no limit
        return free
    return min(free, max(0, most - used))


@contextmanager
def limited(device: str) -> Iterator[None]:
    """In this block an allocation that does not fit fails, where Linux would grant it and kill the
    process when the memory is used. Blocks of several threads must not overlap."""
    with _limit(None if device.startswith("cuda") else available()):
        yield


@contextmanager
def _limit(free: int | None) -> Iterator[None]:
    """Limit this process to `free` more bytes; None: no limit."""
    if free is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    most = [limit for limit in (1024 * held + free, *before) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(most), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _size(count: int) -> str:
    return f"{count / 2**30:,.0f} GiB" if count >= 2**33 else f"{count / 2**20:,.0f} MiB"
