"""The denoising loop as one plan: a recorded step on buffers that stay, run once per timestep.

A step is the network, guidance and the scheduler's row of coefficients; its input is its own
output, its index and coefficients lie in device memory. The host decides nothing between steps: on
a GPU it queues a graph and the two or three copies that tell it which step it is, on a CPU it makes
one call. The recording holds one step, not the whole loop: any number of steps, any scheduler of
the same depth and any guidance replay it, a new shape costs a single step, and a callback may look
after each of them.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.guided_step import guided_step
from fastdiff.kernels.guided_step.spec import HISTORY
from fastdiff.kernels.observe import observed
from fastdiff.models.blocks import channels_first
from fastdiff.runtime import graphs
from fastdiff.runtime.hoist import Hoisted, Network
from fastdiff.runtime.recordings import Kept, Recording, buffer, record, runner
from fastdiff.runtime.schedulers import Table

_ROWS = 64
"""Table rows are allotted in multiples of this, so that few more steps need no new recording."""


class Buffers(NamedTuple):
    """What a step reads and writes. `S`: float32, or float64 for a float64 network."""

    x: Tensor
    """[B, Y, X, C] the network's next input."""
    rows: Tensor
    """[n, …] this step's row of `Hoisted.rows`."""
    text: Tensor
    """[G·B, T, …] `Hoisted.text`."""
    sample: Tensor
    """[B, Y, X, C] S."""
    history: Tensor
    """[2, M, B, Y, X, C] S."""
    table: Tensor
    """[capacity, columns] S."""
    step: Tensor
    """[1] int64."""
    noise: Tensor | None
    """[B, Y, X, C] S, where the scheduler adds any."""


@dataclass(frozen=True)
class Step:
    """A step for one shape."""

    buffers: Buffers
    images: tuple[Tensor, ...]
    """`Hoisted.images`."""
    recording: Recording | None


class Plans:
    """The denoising loops of one network: a step for every shape it has drawn.

    A second loop at the same time (another thread, a callback that draws) runs unrecorded.
    """

    def __init__(self, network: Network, searches: bool = True) -> None:
        self.network, self.searches = network, searches
        self._steps: Kept[Step] = Kept(
            lambda step: 0 if step.recording is None else step.recording.nbytes
        )
        self._lock = threading.Lock()

    @contextmanager
    def start(
        self, latents: Tensor, table: Table, guidance: tuple[float, float], hoisted: Hoisted
    ) -> Iterator["Run"]:
        """A loop from `latents` [B, C, Y, X], as the scheduler starts with them.

        `guidance`: its scale and its rescale. Every advance within the block is one timestep.
        """
        device = latents.device
        free = not observed() and self._lock.acquire(blocking=False)
        try:
            key = _shapes(latents, table, hoisted)
            step = self._kept(key, device) if free else Step(*_allot(key, device), None)
            graphs.fence(device)  # the buffers' former loop may have run on another stream
            run = Run(self, step, table)
            run.condition(hoisted)
            run.guide(*guidance)
            run.set_latents(latents)
            yield run
        finally:
            if free:
                graphs.fence(device)
                self._lock.release()

    def advance(
        self,
        x: Tensor,
        rows: Tensor,
        text: Tensor,
        sample: Tensor,
        history: Tensor,
        table: Tensor,
        step: Tensor,
        noise: Tensor | None,
        *images: Tensor,
    ) -> Tensor:
        """One step on buffers; the network's next input takes the place of `x`."""
        output = self.network.predict(x, rows, text, *images)
        guided_step(output, sample, history, x, table, step, noise)
        return x

    def _kept(self, key: "_Shapes", device: torch.device) -> Step:
        with suppress(torch.OutOfMemoryError):  # a step alone takes less
            return self._steps.get(key, lambda: self._make(key, device))
        return Step(*_allot(key, device), None)

    def _make(self, key: "_Shapes", device: torch.device) -> Step:
        buffers, images = _allot(key, device)
        given = (*buffers, *images)
        recording: Recording | None = None
        if self.network.recordable:
            recording = record(self.advance, given, self.searches)
        return Step(buffers, images, recording)


class Mark(NamedTuple):
    """A loop's state before timestep `at`."""

    at: int
    sample: Tensor
    history: Tensor


class Run:
    """A loop under way, at timestep 0 to begin with."""

    def __init__(self, plans: Plans, step: Step, table: Table) -> None:
        self.network = plans.network
        self._plans, self._step, self._table = plans, step, table
        self.at = 0
        """The timestep that comes next."""

    def condition(self, hoisted: Hoisted) -> None:
        """Tell the network something else from now on; same shapes."""
        self._rows = hoisted.rows
        self._step.buffers.text.copy_(hoisted.text)
        for own, rows in zip(self._step.images, hoisted.images, strict=True):
            if rows.shape[1] > 0:
                own.copy_(rows)
            else:  # an adapter that is off: values of zero add nothing
                own.zero_()

    def guide(self, scale: float, rescale: float) -> None:
        """Guide by other scales from now on."""
        rows = self._table.rows(scale, rescale)
        self._step.buffers.table[: len(rows)].copy_(rows)

    @property
    def draws(self) -> bool:
        """Whether the scheduler draws noise in the next advance."""
        return self._table.draws[self.at]

    def advance(self, noise: Tensor | None = None) -> None:
        """One timestep. `noise` [B, C, Y, X]: what was drawn, where `draws` says so."""
        buffers, recording = self._step.buffers, self._step.recording
        with graphs.in_turn(buffers.x.device):
            buffers.step.fill_(self.at)
            buffers.rows.copy_(self._rows[self.at])
            if buffers.noise is not None and noise is not None:
                buffers.noise.copy_(noise.permute(0, 2, 3, 1))
            if recording is None or observed():
                run = runner(buffers.x.device, self._plans.searches)
                run(self._plans.advance, *buffers, *self._step.images)
            else:
                recording.run()
        self.at += 1

    def mark(self) -> "Mark":
        """What is needed to come back to this timestep."""
        buffers = self._step.buffers
        return Mark(self.at, buffers.sample.clone(), buffers.history.clone())

    def go_back(self, mark: "Mark") -> None:
        """Go on from a mark, of this run or of another network's run of the same loop."""
        self.at = mark.at
        self._step.buffers.history.copy_(mark.history)
        self._set_sample(mark.sample)

    def finite(self) -> bool:
        """Whether the latents hold neither infinity nor NaN; waits for the device."""
        return bool(self._step.buffers.sample.isfinite().all())

    def latents(self, dtype: torch.dtype) -> Tensor:
        """[B, C, Y, X] now."""
        return channels_first(self._step.buffers.sample).to(dtype, copy=True)

    def set_latents(self, latents: Tensor) -> None:
        """Go on from these latents [B, C, Y, X]."""
        self._set_sample(latents.permute(0, 2, 3, 1))

    def _set_sample(self, sample: Tensor) -> None:
        """[B, Y, X, C]; the network's next input is a multiple of it."""
        buffers, scales = self._step.buffers, self._table.scales
        buffers.sample.copy_(sample)
        scale = scales[self.at].item() if self.at < len(scales) else 1.0
        buffers.x.copy_(buffers.sample * scale)


class _Shapes(NamedTuple):
    """What a step is recorded for. Everything else is data."""

    x: torch.Size
    rows: torch.Size
    text: torch.Size
    images: tuple[torch.Size, ...]
    dtype: torch.dtype
    rows_dtype: torch.dtype
    capacity: int
    depth: int
    noisy: bool


def _shapes(latents: Tensor, table: Table, hoisted: Hoisted) -> _Shapes:
    batch, channels, rows, columns = latents.shape
    return _Shapes(
        x=torch.Size((batch, rows, columns, channels)),
        rows=hoisted.rows.shape[1:],
        text=hoisted.text.shape,
        images=tuple(rows.shape for rows in hoisted.images),
        dtype=hoisted.text.dtype,
        rows_dtype=hoisted.rows.dtype,
        capacity=-(-len(table.timesteps) // _ROWS) * _ROWS,
        depth=table.depth,
        noisy=any(table.draws),
    )


def _allot(key: _Shapes, device: torch.device) -> tuple[Buffers, tuple[Tensor, ...]]:
    state = torch.float64 if key.dtype == torch.float64 else torch.float32

    def make(*shape: int, dtype: torch.dtype = state) -> Tensor:
        return buffer(shape, dtype, device).zero_()  # noise that a step does not draw is read, too

    buffers = Buffers(
        x=make(*key.x, dtype=key.dtype),
        rows=make(*key.rows, dtype=key.rows_dtype),
        text=make(*key.text, dtype=key.dtype),
        sample=make(*key.x),
        history=make(2, key.depth, *key.x),
        table=make(key.capacity, HISTORY + 1 + 2 * key.depth),
        step=make(1, dtype=torch.int64),
        noise=make(*key.x) if key.noisy else None,
    )
    return buffers, tuple(make(*shape, dtype=key.dtype) for shape in key.images)
