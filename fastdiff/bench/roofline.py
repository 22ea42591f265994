"""Where time can be saved: the time that every block of a pipeline takes, and its floor.

A block's floor is the longer of two times: its FLOPs at the rate of the GPU's tensor cores, and its
bytes at the bandwidth of the GPU's memory. It is computed, not measured. Bytes are everything that
launches read and write. Data that stays in a cache between launches need not come from memory, so a
memory-bound block can be faster than its floor.

On a CPU the networks are counted as the CPU's kernels fuse them, and the products are not computed
(see `counters`). So the roofline of a GPU needs no such GPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.bench.blocks import Block, count_blocks
from fastdiff.bench.gpus import Gpu, gpu_here, gpu_named
from fastdiff.bench.pipelines import check_size, check_steps
from fastdiff.bench.stopwatch import time_blocks
from fastdiff.bench.tally import Tally
from fastdiff.bench.timing import picture
from fastdiff.compiler import compile, restore
from fastdiff.compiler.loop_state import loop_of
from fastdiff.compiler.options import FASTDIFF
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.recipes import denoiser, exported, needs_picture

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEFAULT = "h200"
ROUNDS = 9


@dataclass(frozen=True)
class Priced:
    """A block of the pipeline and what it takes each time it runs."""

    block: str
    per: str
    """"step" for what every step repeats, "image" for what is done once per picture."""
    launches: int
    flops: int
    bytes: int
    floor_ms: float
    bound: str
    """Which time the floor is: "compute" or "memory"."""
    share: float
    """The share of a whole picture's floor, 0 to 1; a step's blocks count once per step."""
    measured_ms: float | None = None
    """With kernels called one by one, not replayed, on the pipeline's device."""


@dataclass(frozen=True)
class Roofline:
    """All blocks in the order in which a picture runs them; `str(roofline)` is a table."""

    pipeline: str
    gpu: Gpu
    dtype: str
    device: str
    """The device on which blocks were counted and measured: "cpu" or "cuda"."""
    steps: int
    height: int
    width: int
    """Pixels."""
    rows: tuple[Priced, ...]
    assumed: tuple[str, ...] = ()
    """Assumptions where nothing was given and nothing found: a sentence each."""

    @property
    def step_ms(self) -> float:
        """The floor of a step."""
        return sum(row.floor_ms for row in self.rows if row.per == "step")

    @property
    def image_ms(self) -> float:
        """The floor of a picture with all its steps."""
        once = sum(row.floor_ms for row in self.rows if row.per == "image")
        return once + self.steps * self.step_ms

    def __str__(self) -> str:
        from fastdiff.bench.roofline_table import text

        return text(self)


def roofline(
    pipe: Any,
    gpu: str | None = None,
    *,
    steps: int = 20,
    height: int | None = None,
    width: int | None = None,
    rounds: int | None = None,
) -> Roofline:
    """The roofline of each block of a pipeline on a GPU: launches, FLOPs, bytes and floor in ms.

    It is for one picture with guidance (a batch of two) on fastdiff's networks and plan. If `pipe`
    is not compiled, it is compiled for this and restored. `fastdiff.bench.gpus` has the GPUs' rates
    and their sources.

    Args:
        pipe: a pipeline whose row in `fastdiff.recipes` is exported and whose call needs no
            picture; its dtype and device count.
            float16 on a CPU is refused, since our kernels do not compute it there; bfloat16 takes
            the same on a GPU.
        gpu: a name in `fastdiff.bench.gpus.GPUS`; by default torch's first GPU, or without one
            "h200", which the result then names as assumed.
        steps: of the picture; they share what is done once.
        height, width: in pixels; by default the pipeline's own.
        rounds: how often to run each block to measure it, 0 for not at all; by default 9 on a GPU
            and 0 on a CPU, where a full-size network takes minutes.

    Raises:
        UserError: an unsupported pipeline, an unknown GPU, a size that the VAE does not support, a
            scheduler that does not run as a plan; the message says which.
    """
    _check(pipe)
    kind = gpu_named(gpu) if gpu else gpu_here()
    assumed: tuple[str, ...] = ()
    if kind is None:
        if pipe.device.type == "cuda":
            name = torch.cuda.get_device_name(pipe.device)
            raise UserError(f"the rates of {name} are unknown; choose another GPU by its name")
        kind = gpu_named(DEFAULT)
        assumed = (f"{DEFAULT}, because no GPU is here and none was named",)
    if steps < 1:
        raise UserError(f"got {steps} steps; give at least 1")
    check_steps(pipe, steps)
    height, width = check_size(pipe, height, width)
    device = torch.device(pipe.device)
    default = ROUNDS if device.type == "cuda" else 0
    rounds = default if rounds is None else max(0, rounds)
    dtype = denoiser(pipe).dtype

    def draw() -> None:
        picture(pipe, height, width, steps, output_type="pt")

    with _compiled(pipe):
        blocks, calls = count_blocks(pipe, draw)
        times = time_blocks(calls, rounds, device) if rounds else {}
    return Roofline(
        pipeline=type(pipe).__name__,
        gpu=kind,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        steps=steps,
        height=height,
        width=width,
        rows=_rows(blocks, times, kind, dtype, steps),
        assumed=assumed,
    )


def floor(work: Tally, gpu: Gpu, dtype: torch.dtype) -> tuple[float, str]:
    """The least milliseconds of `work` on a GPU, and which rate bounds them."""
    compute_ms = 1e3 * work.flops / gpu.rate(dtype)
    memory_ms = 1e3 * work.bytes / gpu.bytes_per_s
    return (compute_ms, "compute") if compute_ms > memory_ms else (memory_ms, "memory")


def _rows(
    blocks: Sequence[Block], times: Mapping[str, float], gpu: Gpu, dtype: torch.dtype, steps: int
) -> tuple[Priced, ...]:
    floors = [floor(block.work, gpu, dtype) for block in blocks]
    times_run = [steps if block.per == "step" else 1 for block in blocks]
    whole = sum(n * ms for n, (ms, _) in zip(times_run, floors, strict=True))
    return tuple(
        Priced(
            block=block.name,
            per=block.per,
            launches=block.work.launches,
            flops=block.work.flops,
            bytes=block.work.bytes,
            floor_ms=ms,
            bound=bound,
            share=n * ms / whole,
            measured_ms=times.get(block.name),
        )
        for block, n, (ms, bound) in zip(blocks, times_run, floors, strict=True)
    )


def _check(pipe: Any) -> None:
    what = f"a {type(pipe).__name__} has no roofline"
    exported(pipe, what)
    if needs_picture(type(pipe)):
        raise UserError(f"{what}, since it draws from a picture; take the class that draws without")
    slot = slot_of(denoiser(pipe))
    if slot is not None and slot.kind.runner != FASTDIFF:
        raise UserError(f"the network runs on {slot.kind.runner}, not on fastdiff; restore it")
    dtype = denoiser(pipe).dtype
    if dtype not in DTYPES:
        raise UserError(f"the network is {dtype}; roofline takes {', '.join(map(str, DTYPES))}")
    if dtype == torch.float16 and pipe.device.type == "cpu":
        raise UserError(
            "float16 on a CPU runs as plain torch, which is not what a GPU runs;"
            " use bfloat16, whose roofline is the same"
        )


@contextmanager
def _compiled(pipe: Any) -> Iterator[None]:
    """In this block the pipeline is compiled and silent; then it is as before."""
    bar = vars(pipe).get("_progress_bar_config")
    compiled = slot_of(denoiser(pipe)) is not None
    if compiled and loop_of(pipe) is None:
        raise UserError("this pipeline was compiled without its loop; restore it first")
    pipe.set_progress_bar_config(disable=True)
    try:
        if not compiled:
            compile(pipe)
        yield
    finally:
        if not compiled:
            restore(pipe)
        if bar is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = bar
