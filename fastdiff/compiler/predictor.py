"""The network that predicts the steps of a loop: which one it is, and its conditions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler import guidance
from fastdiff.compiler.controls import counting, counts_of, end_of_counting, slots_of
from fastdiff.compiler.loop_call import Call
from fastdiff.compiler.promotion import as_type, first_overflow
from fastdiff.compiler.sharing import Share
from fastdiff.compiler.slot import Slot, slot_of
from fastdiff.errors import UserError
from fastdiff.kernels.observe import entered
from fastdiff.models import Unsupported
from fastdiff.models.blocks import require
from fastdiff.models.hoisted import Hoisted
from fastdiff.runtime.controlled import controlled, hoist
from fastdiff.runtime.denoiser import Denoiser
from fastdiff.runtime.fixed import PLACES, fixed
from fastdiff.runtime.guidance import Guidance
from fastdiff.runtime.loop import Plans


class Predictor:
    """The network of a loop's present step, on `pipe` as it is.

    Raises Unsupported if a network of the loop is not compiled or cannot be given the conditions.
    """

    def __init__(
        self, pipe: Any, call: Call, share: Share | None = None, invariant: bool = False
    ) -> None:
        """invariant: whether a picture must have the same bits however many are drawn with it."""
        self.pipe, self.call, self._setting = pipe, call, partial(call.setting, pipe)
        self.predictions = guidance.predictions_of(self._setting)
        self._share, self._invariant = share, invariant
        self._before: tuple[Any, Hoisted] | None = None
        """The network that hoisted last, and what."""
        for at in reversed(self._parts()):
            self.take(at, call.conditions)
        if invariant:
            count, reason = len(call.latents), self.shared_steps()
            if count > PLACES:
                reason = f"it draws {count} pictures; at most {PLACES} go together"
            if reason is not None:
                raise UserError(f"Options.batch_invariant cannot draw this call: {reason}")

    def shared_steps(self) -> str | None:
        """Why all pictures of this loop must be at the same step, if so."""
        if self.call.skips is not None or self.predictions.perturbed:
            return "its guidance perturbs the network"
        if self.call.plan.last or not getattr(self.denoiser.network, "own_steps", False):
            return "its network takes one timestep for all pictures"
        return None

    def take(self, at: int, given: Any) -> None:
        """Let the component that predicts step `at` predict from now on, under the conditions
        `given`."""
        name = self._network_at(at)
        slot = slot_of(getattr(self.pipe, name))
        if slot is None:
            raise Unsupported(f"the {name} is not compiled")
        self.slot = slot
        self.controls = slots_of(self.pipe, self.call.plan, given)
        self._counting = counting(given, at)
        self.denoiser = self.offer(given)

    def replaced(self) -> str | None:
        """The component whose networks are no longer those of the present step, if any."""
        plan, name = self.call.plan, self.call.plan.network
        if slot_of(getattr(self.pipe, name)) is not self.slot:
            return name
        try:
            same = slots_of(self.pipe, plan, self.call.conditions) == self.controls
        except Unsupported:
            same = False
        return None if same else plan.controls

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Those of the present network and of the loop's ControlNets, each once."""
        return tuple({id(slot): slot for slot in (self.slot, *self.controls)}.values())

    @property
    def version(self) -> int:
        """A number that grows with every change of the weights that autograd can see."""
        return sum(slot.version for slot in self.slots)

    def ran(self, steps: int = 1) -> None:
        """Count steps of the present part."""
        counted = {id(slot): slot for slot in (self.controls[i] for i in self._counting)}
        for slot in (self.slot, *counted.values()):
            slot.fast += steps

    def first_overflow(self, repeat: Callable[[], Any]) -> str:
        """Where float16 overflows in the steps that `repeat` runs."""
        if self.slot.kind.frozen:
            return "the engine"
        nets = {slot.name: slot.module for slot in self.controls}
        return first_overflow(self.slot.module, repeat, nets)

    def promote(self, where: str) -> None:
        """Use float32 copies of all networks of a step, since float16 overflowed in `where`."""
        for slot in self.slots:
            if slot.promotion is None:
                slot.promote(where, self._scale(slot))

    @property
    def plans(self) -> Plans:
        """The loops of the present network."""
        if self._share is not None and self._share.halves:
            return self.denoiser.shared(self._share.ranks.gathered)
        return self.denoiser.plans

    def _parts(self) -> list[int]:
        """The first steps of the loop's parts; see `end_of_part`."""
        starts = [0]
        while (end := self.end_of_part(starts[-1])) < len(self.call.timesteps):
            starts.append(end)
        return starts

    def _network_at(self, at: int) -> str:
        plan = self.call.plan
        return plan.last if plan.last and at + 1 == len(self.call.timesteps) else plan.network

    def end_of_part(self, at: int) -> int:
        """The first step after `at` that another network predicts, or another number of times."""
        count = len(self.call.timesteps)
        end = guidance.end_of_part(self.call.skips, at, count)
        end = min(end, end_of_counting(self.call.conditions, at, count))
        return min(end, count - 1) if self.call.plan.last and at + 1 < count else end

    def guidance(self) -> Guidance:
        """How the pipeline now asks for predictions to be combined."""
        now = guidance.guidance_of(self._setting, self.call.timesteps)
        plan, scale = self.call.plan, now.scale + self.call.plan.beyond
        return now._replace(scale=1 - scale if plan.conditional_first else scale)

    def switched(self) -> bool:
        """Whether the pipeline now asks for more or fewer predictions."""
        return guidance.predictions_of(self._setting) != self.predictions

    def _scale(self, slot: Slot) -> float:
        """The factor by which the call scales LoRA adapters of a network."""
        name = self.call.plan.attention_kwargs
        return slot.kind.scale(**({name: self._setting(name, None)} if name else {}))

    def offer(self, given: Any) -> Denoiser:
        """The network on the weights as they are now, checked with the conditions `given`."""
        denoiser = self._offered(self.slot, given)
        if self._counting:
            denoiser = self._controlled(denoiser, given)
        if self.slot.promotion is None:
            latents, skips = self.call.latents, self.call.skips
            denoiser.network.check(latents, given, self.predictions.count)
            if skips is not None:
                denoiser.network.check(latents, skips.conditions(given), 3)
        if self._invariant and len(self.call.latents) <= PLACES:
            return fixed(denoiser, len(self.call.latents))
        return denoiser

    def _offered(self, slot: Slot, *given: Any) -> Denoiser:
        denoiser: Denoiser = slot.offer(self.call.latents, *given, scale=self._scale(slot))
        return denoiser

    def _controlled(self, denoiser: Denoiser, given: Any) -> Denoiser:
        """The network with those ControlNets that count in the present part."""
        require(hasattr(denoiser.network, "controlled"), "an engine, which takes no residuals")
        nets = [self._offered(slot).network for slot in self.controls]
        if any(slot.promotion is not None for slot in self.slots):
            self.promote("another network of the same step")
            denoiser = self._offered(self.slot, given)
            nets = [self._offered(slot).network for slot in self.controls]
        self._nets = nets  # `Controlled` does not keep them
        own = [nets[i] for i in self._counting]
        return controlled(denoiser, own, self._counting, counts_of(nets))

    def hoist(self, at: int, given: Any, goes_on: bool = False) -> Hoisted:
        """Compute once what all steps like step `at` share; in the network's dtype if it was
        promoted.

        goes_on: whether nothing but the ControlNets that count has changed since the last time,
        unless a callback has.
        """
        told, network = self.told(at, given), self.denoiser.network
        same = goes_on and self.call.callback is None and self.call.plan.controls
        before = self._before if same else None
        made = entered("hoist", lambda: hoist(network, before, *told))
        self._before = network, made
        return made

    def told(self, at: int, given: Any) -> tuple[Any, Tensor, tuple[int, ...]]:
        """The arguments of `Network.hoist` for steps like step `at`."""
        network, latents = self.denoiser.network, self.call.latents
        skips, count = self.call.skips, self.predictions.count
        if skips is not None and at in skips.steps:
            given, count = skips.conditions(given), 3
        if count > 1 + self.predictions.guided:
            given = guidance.with_repeats(given, count, latents.shape[0])
        if self.slot.promotion is not None:
            given = as_type(given, torch.float16, network.dtype)
        if self._share is not None:
            given = self._share.told(given)
        timesteps = self.call.plan.told(self.call.timesteps, latents.dtype)
        return given, timesteps.to(latents.device)[:, None], tuple(latents.shape[2:])
