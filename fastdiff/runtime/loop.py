"""The denoising loop as a plan: a recorded step on fixed buffers, replayed once per timestep.

A step is the network, guidance and one row of the scheduler's coefficients. It overwrites its own
input; its index and coefficients are in device memory. The host decides nothing between steps: on a
GPU it queues a graph and two or three copies that select the step, on a CPU it makes one call. The
recording holds one step, not the whole loop. So any number of steps, any scheduler of the same
depth and any guidance_scale replay it, a new shape costs one recorded step, and a callback can run
after each step.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdiff.kernels.guided_step import guided_step
from fastdiff.kernels.observe import entered, observed
from fastdiff.models.hoisted import Hoisted
from fastdiff.runtime import graphs
from fastdiff.runtime.buffers import Buffers, buffers_of, inputs_of
from fastdiff.runtime.guidance import Guidance, Inpainting
from fastdiff.runtime.network import Network
from fastdiff.runtime.recordings import (
    Kept,
    Recording,
    fill,
    first_of,
    kinds,
    record,
    runner,
)
from fastdiff.runtime.table import Table

STEP = "guided step"
"""The name under which `kernels.observe.entered` sees a step."""
_ROWS = 64
"""Tables are allocated in multiples of this, so a few more steps need no new recording."""


@dataclass(frozen=True)
class Step:
    """A step for one shape, recorded if possible."""

    buffers: Buffers
    recording: Recording | None


class Plans:
    """The denoising loops of one network: a step for every shape so far.

    If a second loop runs at the same time (in another thread, or started by a callback), it is not
    recorded.
    """

    def __init__(
        self,
        network: Network,
        searches: bool = True,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """gather: makes the predictions of a step, [G·B, ...], of those that `network` makes here;
        None if these are all."""
        self.network, self.searches, self._gather = network, searches, gather
        self.fixed: dict[int, Any] = {}
        """Denoisers of `runtime.fixed`, by their number of pictures."""
        self.own: dict[Hashable, Any] = {}
        """What `places.of_each` found for this network."""
        self._steps: Kept[Step] = Kept(
            lambda step: 0 if step.recording is None else step.recording.nbytes
        )
        self._lock = threading.Lock()

    def gathering(self, gather: Callable[[Tensor], Tensor]) -> "Plans":
        """Loops of the same network, of whose predictions `gather` makes those of a step."""
        return Plans(self.network, self.searches, gather)

    @contextmanager
    def start(
        self,
        latents: Tensor,
        table: Table,
        guidance: Guidance,
        hoisted: Hoisted,
        inpainting: Inpainting | None = None,
    ) -> Iterator["Run"]:
        """A loop from `latents` [B, …], the scheduler's first sample.

        In the block, each advance is one timestep.
        """
        kept = () if inpainting is None else inpainting.pictures(latents)
        given = (
            *inputs_of(self.network, latents, hoisted),
            *(-(-len(table.timesteps) // _ROWS) * _ROWS, table.depth, any(table.draws)),
            *(len(kept), table.thresholds),
        )
        pictures = [self.network.pack(picture) for picture in kept]
        factors = None if inpainting is None else inpainting.factors
        run = Run(self, given, table, tuple(latents.shape[2:]), pictures, factors)
        with run.using():
            run.condition(hoisted)
            run.guide(guidance)
            run.set_latents(latents)
            yield run

    @contextmanager
    def step(self, given: tuple[Any, ...]) -> Iterator[Step]:
        """A step on buffers for `given`, the arguments of `buffers_of`, that nothing else uses in
        the block. It is not recorded if another loop uses the recordings."""
        device = given[0].device
        free = not observed() and self._lock.acquire(blocking=False)
        try:
            make = partial(buffers_of, *given)
            step = self._kept(kinds(given), make) if free else Step(make(), None)
            graphs.fence(device)  # these buffers' last loop may have run on another stream
            yield step
        finally:
            if free:
                graphs.fence(device)
                self._lock.release()

    def advance(
        self,
        x: Tensor,
        row: Any,
        constants: Any,
        sample: Tensor,
        history: Tensor,
        table: Tensor,
        step: Tensor,
        noise: Tensor | None,
        kept: tuple[Tensor, ...],
        limits: Tensor | None,
    ) -> Tensor:
        """Run a step; it writes the network's next input into `x`."""
        output = self.network.predict(x, row, constants)
        if self._gather is not None:
            output = self._gather(output)
        mask, original, original_noise = (*kept, None, None, None)[:3]
        guided_step(
            *(output, sample, history, x, table, step, noise),
            *(mask, original, original_noise, limits),
        )
        return x

    def run(self, buffers: Buffers) -> None:
        """Run a step on buffers, unrecorded."""
        runner(buffers.x.device, self.searches)(self.advance, *buffers)

    def recorded(self, buffers: Buffers) -> Recording | None:
        """A step on buffers, recorded if possible; what is in them is lost."""
        if not self.network.recordable:
            return None
        return record(self.advance, buffers, self.searches)

    def _kept(self, key: Hashable, make: Callable[[], Buffers]) -> Step:
        def made() -> Step:
            buffers = make()
            return Step(buffers, self.recorded(buffers))

        with suppress(torch.OutOfMemoryError):  # an unrecorded step needs less
            return self._steps.get(key, made)
        return Step(make(), None)


class Mark(NamedTuple):
    """A loop's state before timestep `at`, independent of how a network packs latents."""

    at: int
    sample: Tensor
    """[B, …] as diffusers' latents."""
    history: Tensor
    """[2·M·B, …] likewise."""


class Run:
    """A loop in progress."""

    def __init__(
        self,
        plans: Plans,
        given: tuple[Any, ...],
        table: Table,
        sides: tuple[int, ...],
        kept: Sequence[Tensor],
        factors: Tensor | None,
    ) -> None:
        """given: the arguments of `buffers_of`. kept: what fills `Buffers.kept`."""
        self.network = plans.network
        self._plans, self._given, self._table, self._sides = plans, given, table, sides
        self._kept, self._factors = kept, factors
        self._using = ExitStack()
        self.at = 0
        """The next timestep's index."""

    @contextmanager
    def using(self) -> Iterator[None]:
        """In the block the run has a step's buffers."""
        try:
            self._take()
            yield
        finally:
            self._using.close()

    def _take(self) -> None:
        self._step = self._using.enter_context(self._plans.step(self._given))
        self._row = tree_leaves(self._step.buffers.row)
        for own, packed in zip(self._step.buffers.kept, self._kept, strict=True):
            own.copy_(packed)

    def lend(self, wait: Callable[[], None]) -> None:
        """Let other loops use the step while `wait` runs."""
        before = self._step.buffers
        state = [tensor.clone() for tensor in (before.x, before.sample, before.history)]
        self._using.close()
        wait()
        self._take()
        self.condition(self._hoisted)
        self.guide(self._guidance)
        buffers = self._step.buffers
        for own, kept in zip((buffers.x, buffers.sample, buffers.history), state, strict=True):
            own.copy_(kept)

    def condition(self, hoisted: Hoisted) -> None:
        """Change the conditions from the next step on; shapes must stay the same."""
        self._hoisted, self._rows = hoisted, tree_leaves(hoisted.rows)
        fill(tree_leaves(self._step.buffers.constants), tree_leaves(hoisted.constants))

    def takes(self, hoisted: Hoisted) -> bool:
        """Whether `condition` accepts these: the recorded shapes, or empty tensors for 'off'."""
        kept = tree_leaves((self._step.buffers.row, self._step.buffers.constants))
        rows = first_of(hoisted.rows)
        told = tree_leaves((rows, hoisted.constants))
        return len(kept) == len(told) and all(
            own.shape == now.shape or not now.numel()
            if isinstance(own, Tensor) and isinstance(now, Tensor)
            else own == now
            for own, now in zip(kept, told, strict=True)
        )

    def guide(self, guidance: Guidance) -> None:
        """Change the guidance from the next step on."""
        self._guidance, rows = guidance, self._table.rows(guidance, self._factors)
        self._step.buffers.table[: len(rows)].copy_(rows)

    @property
    def draws(self) -> bool:
        """Whether the scheduler draws noise in the next step."""
        return self._table.draws[self.at]

    def advance(self, noise: Tensor | None = None) -> None:
        """Run one timestep. `noise` [B, …]: the noise drawn for it, if `draws`."""
        entered(STEP, partial(self._advance, self.at, noise))
        self.at += 1

    def _advance(self, at: int, noise: Tensor | None) -> None:
        buffers, recording = self._step.buffers, self._step.recording
        with graphs.in_turn(buffers.x.device):
            buffers.step.fill_(at)
            fill(self._row, [rows[at] if isinstance(rows, Tensor) else rows for rows in self._rows])
            if buffers.noise is not None and noise is not None:
                buffers.noise.copy_(self.network.pack(noise))
            if recording is None or observed():
                self._plans.run(buffers)
            else:
                recording.run()

    def mark(self) -> "Mark":
        """A copy of the state, to come back to this timestep."""
        sample, history = self._step.buffers.sample, self._step.buffers.history.flatten(0, 2)
        kept = (self.network.unpack(packed, self._sides) for packed in (sample, history))
        return Mark(self.at, *(tensor.clone() for tensor in kept))

    def go_back(self, mark: "Mark") -> None:
        """Resume from a mark of this run, or of another network's run of the same loop."""
        self.at = mark.at
        history = self._step.buffers.history
        history.copy_(self.network.pack(mark.history).reshape(history.shape))
        self.set_latents(mark.sample)

    def finite(self) -> bool:
        """Whether the latents are free of infinities and NaNs; waits for the device."""
        return bool(self._step.buffers.sample.isfinite().all())

    def latents(self, dtype: torch.dtype) -> Tensor:
        """A copy of the present latents, [B, …]."""
        latents: Tensor = self.network.unpack(self._step.buffers.sample, self._sides)
        return latents.to(dtype, copy=True)

    def set_latents(self, latents: Tensor) -> None:
        """Continue from these latents [B, …]; the network's next input is a multiple of them."""
        buffers, scales = self._step.buffers, self._table.scales
        buffers.sample.copy_(self.network.pack(latents))
        scale = scales[self.at].item() if self.at < len(scales) else 1.0
        buffers.x.copy_(buffers.sample * scale)
