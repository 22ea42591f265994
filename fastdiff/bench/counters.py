"""Launches, bytes and FLOPs of a picture: counted, not timed, so they are always the same.

A launch is a dispatched op that computes or moves data, not a view or an allocation. One of our
kernels counts as one launch in C++ or Triton; in plain torch it counts as its dispatched ops. A
step's counts are the difference between pictures with n and n - 1 steps, so one-time work is zero
per step.

On a CPU, large products, convolutions and our kernels are counted without being computed: their
results are zeros in the right layout, so that a full-size network takes only seconds. The pictures
are not valid.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from fastdiff.bench.backends import BACKENDS
from fastdiff.bench.drawn import Drawn, drawn
from fastdiff.bench.memory import baseline
from fastdiff.bench.results import now
from fastdiff.bench.tally import KINDS, Counter, Tally, Work, total
from fastdiff.bench.timing import picture
from fastdiff.kernels.observe import counting

SCHEMA = "fastdiff.counts/1"


@dataclass(frozen=True)
class Counts:
    """Counts per step, and per picture without its steps.

    The latter is a difference: if early steps are cheaper than later ones (a scheduler without
    history), it is too low by that much, and can be negative.
    """

    step: Work
    image: Work
    step_kernels: int | None = None
    """Kernels and copies that ran on the GPU; None on a CPU."""
    image_kernels: int | None = None


@dataclass(frozen=True)
class Counted:
    """The counts of one backend."""

    backend: str
    counts: Counts
    drawn: Drawn | None = None
    """Counts from drawing real pictures; None if none were drawn."""


@dataclass(frozen=True)
class Result:
    """All rows, and where they come from.

    Counts depend on the kind of device, on versions and on whether the C++ kernels were built; only
    `step_kernels` and `image_kernels` depend on the GPU.
    """

    case: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    commit: str | None
    created: str = field(default_factory=now, kw_only=True)
    command: str
    rows: tuple[Counted, ...]


def to_json(result: Result) -> str:
    """The result as schema `fastdiff.counts/1`, with totals per step and per image."""
    document = asdict(result)
    for row, counted in zip(document["rows"], result.rows, strict=True):
        for part in ("step", "image"):
            row["counts"][f"{part}_total"] = asdict(total(getattr(counted.counts, part)))
    return json.dumps({"schema": SCHEMA, **document}, indent=1) + "\n"


def count_pipe(
    pipe: Any,
    steps: int,
    height: int,
    width: int,
    log: Callable[[str], None] = lambda line: None,
    draw: bool = False,
) -> Iterator[Counted]:
    """Count a text-to-image pipeline up to its latents: eager, then compiled in place.

    Guidance is on, so a step runs a batch of two, as for most users. height and width are in
    pixels.
    `log` receives progress. draw: also draw real pictures with fastdiff; see `drawn`.
    """
    for name in ("eager", "fastdiff"):
        log(f"counting {name}")
        # memory counts from zero for this pipeline alone
        before = replace(baseline(pipe.device), reserved=0)
        BACKENDS[name](pipe)
        real = drawn(pipe, height, width, before) if draw and name == "fastdiff" else None
        yield Counted(name, count_pictures(pipe, height, width, steps), real)


def count_pictures(pipe: Any, height: int, width: int, steps: int = 3) -> Counts:
    """Count the pictures of `pipe` as it is, up to their latents."""
    return count(lambda steps: picture(pipe, height, width, steps), steps, pipe.device)


def count(draw: Callable[[int], object], steps: int, device: torch.device) -> Counts:
    """Count `draw(steps - 1)` and `draw(steps)`: the difference per step, the rest per image.

    Both run once before, uncounted, so that what is kept for the next picture is not counted.
    steps:
    at least 2. On a GPU they run twice more, the second time with the profiler.
    """
    both = (steps - 1, steps)
    for n in both:
        _work(draw, n, device)
    short, long = (_work(draw, n, device) for n in both)
    step = _difference(long, short, 1)
    image = _difference(short, step, steps - 1)
    if device.type != "cuda":
        return Counts(step, image)
    for n in both:
        draw(n)  # make recordings now: none are made while counting
    fewer, more = (_kernels(draw, n) for n in both)
    return Counts(step, image, more - fewer, fewer - (steps - 1) * (more - fewer))


def _work(draw: Callable[[int], object], steps: int, device: torch.device) -> Work:
    with counting() as called, Counter(device, called) as counter:
        draw(steps)
    return dict(counter.work)


def _difference(work: Work, other: Work, times: int) -> Work:
    """work - times · other, in the order of KINDS, without zero entries."""
    none = Tally()
    rest = {kind: work.get(kind, none).plus(other.get(kind, none), -times) for kind in KINDS}
    return {kind: tally for kind, tally in rest.items() if tally != none}


def _kernels(draw: Callable[[int], object], steps: int) -> int:
    """The kernels, copies and fills that a GPU ran; each node of a CUDA graph counts."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        draw(steps)
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profiler.events() or ())
