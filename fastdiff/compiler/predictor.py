"""The network that predicts the steps of a loop: which one it is, and its conditions."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler import guidance
from fastdiff.compiler.loop_call import Call
from fastdiff.compiler.promotion import as_type
from fastdiff.compiler.sharing import Share
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.kernels.observe import entered
from fastdiff.models import Unsupported
from fastdiff.models.hoisted import Hoisted
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
        for at in (len(call.timesteps) - 1, 0):
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
        self.denoiser = self.offer(given)

    @property
    def plans(self) -> Plans:
        """The loops of the present network."""
        if self._share is not None and self._share.halves:
            return self.denoiser.shared(self._share.ranks.gathered)
        return self.denoiser.plans

    def _network_at(self, at: int) -> str:
        plan = self.call.plan
        return plan.last if plan.last and at + 1 == len(self.call.timesteps) else plan.network

    def end_of_part(self, at: int) -> int:
        """The first step after `at` that another network predicts, or another number of times."""
        count = len(self.call.timesteps)
        end = guidance.end_of_part(self.call.skips, at, count)
        return min(end, count - 1) if self.call.plan.last and at + 1 < count else end

    def guidance(self) -> Guidance:
        """How the pipeline now asks for predictions to be combined."""
        now = guidance.guidance_of(self._setting, self.call.timesteps)
        plan, scale = self.call.plan, now.scale + self.call.plan.beyond
        return now._replace(scale=1 - scale if plan.conditional_first else scale)

    def switched(self) -> bool:
        """Whether the pipeline now asks for more or fewer predictions."""
        return guidance.predictions_of(self._setting) != self.predictions

    def scale(self) -> float:
        """The factor by which the call scales LoRA adapters."""
        name = self.call.plan.attention_kwargs
        return self.slot.kind.scale(**({name: self._setting(name, None)} if name else {}))

    def offer(self, given: Any) -> Denoiser:
        """The network on the weights as they are now, checked with the conditions `given`."""
        denoiser: Denoiser = self.slot.offer(self.call.latents, given, scale=self.scale())
        if self.slot.promotion is None:
            latents, skips = self.call.latents, self.call.skips
            denoiser.network.check(latents, given, self.predictions.count)
            if skips is not None:
                denoiser.network.check(latents, skips.conditions(given), 3)
        if self._invariant and len(self.call.latents) <= PLACES:
            return fixed(denoiser, len(self.call.latents))
        return denoiser

    def hoist(self, at: int, given: Any) -> Hoisted:
        """Compute once what all steps like step `at` share; in the network's dtype if it was
        promoted."""
        told = self.told(at, given)
        return entered("hoist", lambda: self.denoiser.network.hoist(*told))

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
