"""All steps of one denoising loop on the plan: noise, callbacks, the progress bar, overflow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.compiler.fits import fit_images, one_text_each
from fastdiff.compiler.promotion import as_type, first_overflow, overflowed
from fastdiff.compiler.slot import slot_of
from fastdiff.compiler.steps import StepUNet
from fastdiff.errors import UserError
from fastdiff.models import Unsupported
from fastdiff.runtime.hoist import Conditions, Hoisted, hoist
from fastdiff.runtime.loop import Mark, Run
from fastdiff.runtime.schedulers import probe

Callback = Callable[..., dict[str, Any]]

EMBEDDINGS = {
    "prompt_embeds": "text",
    "add_text_embeds": "text_embeds",
    "add_time_ids": "time_ids",
}
"""What a callback may return beside the latents, and what it is in `Conditions`."""


@dataclass(frozen=True)
class Call:
    """A loop about to begin. What its pipeline is set to is read from the pipeline."""

    latents: Tensor
    """[B, C, Y, X]; the result replaces its values."""
    conditions: Conditions
    timesteps: Tensor
    step_options: Mapping[str, Any]
    """Further arguments of the scheduler's `step`; the generator among them."""
    bar: Any
    warm_up: int
    """Steps that do not move the bar: those that a scheduler of higher order takes beside."""
    callback: Callback | None
    """As `callback_on_step_end`, which sees the latents."""


class Denoising:
    """A loop that can run as a plan, on `pipe` as it is.

    Raises Unsupported or NotLinear, before anything is drawn, where it cannot.
    """

    def __init__(self, pipe: Any, call: Call) -> None:
        slot = slot_of(pipe.unet)
        if slot is None:
            raise Unsupported("the U-Net is not compiled")
        copies = 2 if pipe.do_classifier_free_guidance else 1
        one_text_each(call.conditions.text, call.latents, copies)
        self.pipe, self.slot, self.call, self.given = pipe, slot, call, call.conditions
        self.scheduler, self.guided = pipe.scheduler, pipe.do_classifier_free_guidance
        self.unet = self._offer()
        self.table = probe(pipe.scheduler, call.step_options, call.timesteps)
        if call.callback is not None and not self.table.editable:
            name = type(pipe.scheduler).__name__
            raise Unsupported(f"a callback might change the latents, which {name} keeps to itself")
        self.hoisted = self._hoist()
        self.noises: dict[int, Tensor] = {}
        """What was drawn since the last mark, by step: repeated steps must not draw again."""
        self.reached = 0
        """Steps that the progress bar has seen."""

    def run(self) -> None:
        """All steps; the result replaces the values of the call's latents."""
        guarded = self.unet.dtype == torch.float16 and not overflowed(self.call.latents)
        mark = self._run_from(None, guarded)
        if mark is not None:
            self._run_from(mark, guarded=False)

    def _run_from(self, mark: Mark | None, guarded: bool) -> Mark | None:
        """All steps from a mark on; where float16 overflowed, the mark to go on from in float32."""
        call, plans = self.call, self.unet.plans
        with plans.start(call.latents, self.table, self._guidance(), self.hoisted) as run:
            if mark is not None:
                run.go_back(mark)
            right = self._advance(run, guarded)
            if right is None:
                call.latents.copy_(run.latents(call.latents.dtype))
                return None
            where = "the engine"
            if not self.slot.kind.frozen:
                where = first_overflow(self.slot.module, lambda: self._repeat(run, right))
        self.slot.promote(where, self._scale())
        self.unet = self._offer()
        self.hoisted = self._hoist()
        return right

    def _advance(self, run: Run, guarded: bool) -> Mark | None:
        """Steps from `run.at` on; a mark to go back to if float16 overflowed after it."""
        call, count = self.call, len(self.call.timesteps)
        mark: Mark | None = None
        while run.at < count and not self.pipe._interrupt:
            i = run.at
            if guarded and (mark is None or call.callback is not None):
                mark = run.mark()
                self.noises.clear()
            noise = self.noises.get(i)
            if run.draws and noise is None:
                noise = self._draw()
                if guarded:
                    self.noises[i] = noise
            run.advance(noise)
            self.slot.fast += 1
            looked_at = call.callback is not None or run.at == count
            if guarded and looked_at and not run.finite():
                return mark
            if call.callback is not None:
                self._look(call.callback, run, i)
            self._show(i)
        return None

    def _repeat(self, run: Run, mark: Mark) -> None:
        """The steps since `mark` once more."""
        last = run.at
        run.go_back(mark)
        while run.at < last:
            run.advance(self.noises.get(run.at))

    def _draw(self) -> Tensor:
        """What the scheduler would draw: by the same generator, in the same dtype and order."""
        noise: Tensor = randn_tensor(
            self.call.latents.shape,
            generator=self.call.step_options.get("generator"),
            device=self.call.latents.device,
            dtype=self.table.noise_dtype or self.call.latents.dtype,
        )
        return noise

    def _show(self, i: int) -> None:
        """Move the progress bar as diffusers does."""
        done, last = i + 1, len(self.call.timesteps)
        if done > self.reached:
            self.reached = done
            whole = done > self.call.warm_up and done % self.scheduler.order == 0
            if done == last or whole:
                self.call.bar.update()

    def _look(self, callback: Callback, run: Run, i: int) -> None:
        """Let the callback see the latents; honour what it does to them and to the pipeline."""
        pipe, call, version = self.pipe, self.call, self.slot.version
        if hasattr(self.scheduler, "_step_index"):  # previews look up their sigma by it
            self.scheduler._step_index = (self.scheduler._begin_index or 0) + i + 1
        latents = run.latents(call.latents.dtype)
        returned = callback(pipe, i, call.timesteps[i], {"latents": latents})
        following = returned.pop("latents", latents)  # that very tensor may have been edited
        self._refuse(following.shape != latents.shape, "gave latents of another shape")
        self._refuse(slot_of(pipe.unet) is not self.slot, "replaced the U-Net")
        self._refuse(pipe.scheduler is not self.scheduler, "replaced the scheduler")
        self._refuse(
            pipe.do_classifier_free_guidance != self.guided,
            "switched guidance on or off, but left the prompt as it was: ask for prompt_embeds"
            " in callback_on_step_end_tensor_inputs and return them",
        )
        run.set_latents(following)
        run.guide(*self._guidance())
        changed = self._told(returned)
        try:
            unet = self._offer()
        except Unsupported as reason:
            self._refuse(True, f"changed the U-Net beyond what fastdiff computes ({reason})")
        self._refuse(unet.network is not run.network, "replaced parts of the U-Net")
        adapted = unet.network.ip_adapters is not None  # their scales may be others now
        if changed or adapted or self.slot.version != version:
            hoisted = self._hoist()
            pairs = zip(hoisted.images, self.hoisted.images, strict=True)
            self._refuse(
                any(now.shape[1] > first.shape[1] for now, first in pairs),
                "switched on an IP-Adapter that was off",
            )
            run.condition(hoisted)

    def _told(self, returned: dict[str, Any]) -> bool:
        """Take over the embeddings that a callback returned; whether there were any."""
        fields = {name: field for name, field in EMBEDDINGS.items() if name in returned}
        for name, field in fields.items():
            before, after = getattr(self.given, field), returned[name]
            same = isinstance(before, Tensor) and before.shape == after.shape
            self._refuse(not same, f"returned {name} of another shape")
            self.given = replace(self.given, **{field: after})
        return bool(fields)

    def _refuse(self, condition: bool, what: str) -> None:
        if condition:
            raise UserError(f"callback_on_step_end {what}; do that between two pictures")

    def _guidance(self) -> tuple[float, float]:
        """Scale and rescale as the pipeline has them now; diffusers ignores a negative rescale."""
        rescale = float(getattr(self.pipe, "guidance_rescale", 0.0))
        return float(self.pipe.guidance_scale), max(0.0, rescale)

    def _scale(self) -> float:
        """What the call multiplies LoRA adapters by."""
        return self.slot.kind.scale(cross_attention_kwargs=self.pipe.cross_attention_kwargs)

    def _offer(self) -> StepUNet:
        unet: StepUNet = self.slot.offer(
            self.call.latents, *vars(self.given).values(), scale=self._scale()
        )
        if self.slot.promotion is None:
            unet.fit(self.call.latents, self.given)
        return unet

    def _hoist(self) -> Hoisted:
        """What is computed once; in the network's own dtype where it was promoted."""
        wanted, dtype = self.unet.dtype, self.given.text.dtype
        given = self.given
        if wanted != dtype:
            given = Conditions(**as_type(vars(given), dtype, wanted))
        hoisted = hoist(self.unet.network, self.call.timesteps, given)
        fit_images(self.unet.network, given, hoisted.images)
        return hoisted
