"""Where the next millisecond is: every block of a pipeline, what it takes, and what it must take.

A block's floor is the longer of two times: that of its FLOPs at the rate of the GPU's tensor cores,
and that of its bytes at the bandwidth of the GPU's memory. It is arithmetic, no measurement. Bytes
are all that the launches read and write; what stays in a cache from one launch to the next need not
come from memory, so a block that is bound by memory can beat its floor.

On a CPU the networks are counted as the CPU's kernels fuse them, and the products are not computed
(see `counters`): a GPU for which there is no such machine at hand can be priced.
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
from fastdiff.compiler.options import FASTDIFF
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.recipes import denoiser, exported

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEFAULT = "h200"
ROUNDS = 9


@dataclass(frozen=True)
class Priced:
    """A block of the pipeline and what it takes each time that it runs."""

    block: str
    per: str
    """"step" for what every step repeats, "image" for what is done once."""
    launches: int
    flops: int
    bytes: int
    floor_ms: float
    bound: str
    """Which of the two the floor is: "compute" or "memory"."""
    share: float
    """Of the floor of a whole image, 0 to 1; a step's counts once per step."""
    measured_ms: float | None = None
    """Kernels called one by one, not replayed, on the device that the pipeline is on."""


@dataclass(frozen=True)
class Roofline:
    """All blocks in the order in which an image meets them; `str(roofline)` is a table."""

    pipeline: str
    gpu: Gpu
    dtype: str
    device: str
    """Where blocks were counted and measured: "cpu" or "cuda"."""
    steps: int
    height: int
    width: int
    """Pixels."""
    rows: tuple[Priced, ...]
    assumed: tuple[str, ...] = ()
    """What was not asked for and not found here: a sentence each."""

    @property
    def step_ms(self) -> float:
        """The floor of a step."""
        return sum(row.floor_ms for row in self.rows if row.per == "step")

    @property
    def image_ms(self) -> float:
        """The floor of an image with all its steps."""
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
    """Price each block of a pipeline on a GPU: launches, FLOPs, bytes and the floor in ms.

    One picture with guidance (a batch of two) on fastdiff's networks and plan; `pipe` is compiled
    for it where it is not, and restored. Source of the GPUs' figures: `fastdiff.bench.gpus`.

    Args:
        pipe: a StableDiffusionPipeline or StableDiffusionXLPipeline; its dtype and device count.
            float16 on a CPU is refused, which our kernels do not compute there: bfloat16 costs
            a GPU the same.
        gpu: a name in `fastdiff.bench.gpus.GPUS`; if None the one that torch sees, else "h200",
            and the result says that it was assumed.
        steps: of the picture; they share what is done once.
        height, width: pixels; the pipeline's own if None.
        rounds: how often each block is run to measure it, 0 for not at all; if None 9 on a GPU and
            0 on a CPU, where a full-size network takes minutes.

    Raises:
        UserError: another pipeline, an unknown GPU, a size that the VAE has not, a scheduler that
            does not run as a plan; the message says which.
    """
    _check(pipe)
    kind = gpu_named(gpu) if gpu else gpu_here()
    assumed: tuple[str, ...] = ()
    if kind is None:
        if pipe.device.type == "cuda":
            name = torch.cuda.get_device_name(pipe.device)
            raise UserError(f"the rates of {name} are not known here; name the GPU to price on")
        kind, assumed = gpu_named(DEFAULT), (f"{DEFAULT}, as no GPU is here and none was named",)
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
    """Milliseconds that `work` takes at least on a GPU, and what binds it."""
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
    exported(pipe, f"a {type(pipe).__name__} cannot be priced")
    slot = slot_of(denoiser(pipe))
    if slot is not None and slot.kind.runner != FASTDIFF:
        raise UserError(f"the U-Net runs on {slot.kind.runner}, whose blocks are its own; restore")
    dtype = denoiser(pipe).dtype
    if dtype not in DTYPES:
        raise UserError(f"the U-Net is {dtype}; GPUs are priced for {', '.join(map(str, DTYPES))}")
    if dtype == torch.float16 and pipe.device.type == "cpu":
        raise UserError(
            "float16 on a CPU runs as plain torch, which is not what a GPU runs;"
            " price bfloat16, which costs it the same"
        )


@contextmanager
def _compiled(pipe: Any) -> Iterator[None]:
    """Compiled within it, and silent; afterwards as it was."""
    bar = vars(pipe).get("_progress_bar_config")
    compiled = slot_of(denoiser(pipe)) is not None
    if compiled and loop_of(pipe) is None:
        raise UserError("this pipeline was compiled without its loop; restore it to be priced")
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
