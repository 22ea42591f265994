"""All steps of one denoising loop on the plan: noise, callbacks, the progress bar, overflow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.compiler.adapters import StepUNet, check_fit
from fastdiff.compiler.promotion import as_type, first_overflow, overflowed
from fastdiff.compiler.slot import Slot, slot_of
from fastdiff.errors import UserError
from fastdiff.models import Unsupported
from fastdiff.runtime.hoist import Conditions, hoist
from fastdiff.runtime.loop import Mark, Run
from fastdiff.runtime.schedulers import Table, probe

Callback = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """A loop about to begin. What its pipeline is set to is read from the pipeline."""

    latents: Tensor
    """[B, C, Y, X]; the result replaces its values."""
    conditions: Conditions
    attention: Mapping[str, Any] | None
    """`cross_attention_kwargs`."""
    timesteps: Tensor
    step_options: Mapping[str, Any]
    """Further arguments of the scheduler's `step`; the generator among them."""
    bar: Any
    warm_up: int
    """Steps that do not move the bar: those that a scheduler of higher order takes beside."""
    callback: Callback | None
    """As `callback_on_step_end`, which sees the latents."""


def denoise(pipe: Any, call: Call) -> None:
    """Run all steps of `call`.

    Raises Unsupported or NotLinear, before anything is drawn, where the plan does not apply.
    """
    slot = slot_of(pipe.unet)
    if slot is None:
        raise Unsupported("the U-Net is not compiled")
    copies = 2 if pipe.do_classifier_free_guidance else 1
    texts, batch = call.conditions.text.shape[0], call.latents.shape[0]
    if texts != copies * batch:
        raise Unsupported(f"{texts} texts for {batch} latents")
    loop = _Loop(pipe, slot, call)
    unet = loop.offer()
    table = probe(pipe.scheduler, call.step_options, call.timesteps)
    if call.callback is not None and not table.editable:
        name = type(pipe.scheduler).__name__
        raise Unsupported(f"a callback might change the latents, which {name} keeps to itself")
    mark: Mark | None = None
    while True:
        given = loop.conditions(unet)
        hoisted = hoist(unet.network, call.timesteps, given)
        with unet.plans.start(call.latents, table, loop.guidance, hoisted) as run:
            if mark is not None:
                run.go_back(mark)
            mark = loop.advance(run, unet, table)
            if mark is None:
                call.latents.copy_(run.latents(call.latents.dtype))
                return
            where = first_overflow(pipe.unet, lambda: loop.repeat(run, mark))  # noqa: B023
        slot.promote(where, loop.scale)
        unet = loop.offer()


@dataclass
class _Loop:
    pipe: Any
    slot: Slot
    call: Call
    noises: dict[int, Tensor] = field(default_factory=dict)
    """What was drawn, by step: a step that is repeated must not draw again."""
    reached: int = 0
    """Steps that the progress bar has seen."""

    @property
    def guidance(self) -> tuple[float, float]:
        """Scale and rescale as the pipeline has them now."""
        return float(self.pipe.guidance_scale), float(getattr(self.pipe, "guidance_rescale", 0.0))

    @property
    def scale(self) -> float:
        """What the call multiplies LoRA adapters by."""
        return self.slot.kind.scale(cross_attention_kwargs=self.call.attention)

    def offer(self) -> StepUNet:
        given = self.call.conditions
        attention = {**(self.call.attention or {})}
        attention.pop("scale", None)
        if attention:
            raise Unsupported(f"it was given {', '.join(attention)} in cross_attention_kwargs")
        unet: StepUNet = self.slot.offer(self.call.latents, *vars(given).values(), scale=self.scale)
        if self.slot.promotion is None:
            check_fit(unet.network, self.call.latents, given)
        return unet

    def conditions(self, unet: StepUNet) -> Conditions:
        """As `unet` takes them: in its own dtype where it was promoted."""
        given: Conditions = self.call.conditions
        if unet.dtype == given.text.dtype:
            return given
        return Conditions(**as_type(vars(given), given.text.dtype, unet.dtype))

    def advance(self, run: Run, unet: StepUNet, table: Table) -> Mark | None:
        """Steps from `run.at` on; a mark to go back to if float16 overflowed after it."""
        call, count = self.call, len(self.call.timesteps)
        guarded = unet.dtype == torch.float16 and not overflowed(call.latents)
        mark = run.mark()
        while run.at < count and not self.pipe._interrupt:
            i = run.at
            if guarded and call.callback is not None:
                mark = run.mark()
            if run.draws and i not in self.noises:
                self.noises[i] = self._draw(table)
            run.advance(self.noises.get(i))
            self.slot.fast += 1
            looked_at = call.callback is not None or run.at == count
            if guarded and looked_at and not run.finite():
                return mark
            if call.callback is not None:
                self._look(call.callback, run, i)
            self._show(i)
        return None

    def repeat(self, run: Run, mark: Mark) -> None:
        """The steps since `mark` once more."""
        last = run.at
        run.go_back(mark)
        while run.at < last:
            run.advance(self.noises.get(run.at))

    def _draw(self, table: Table) -> Tensor:
        """What the scheduler would draw: by the same generator, in the same dtype and order."""
        noise: Tensor = randn_tensor(
            self.call.latents.shape,
            generator=self.call.step_options.get("generator"),
            device=self.call.latents.device,
            dtype=table.noise_dtype or self.call.latents.dtype,
        )
        return noise

    def _show(self, i: int) -> None:
        """Move the progress bar as diffusers does."""
        done, last = i + 1, len(self.call.timesteps)
        if done > self.reached:
            self.reached = done
            whole = done > self.call.warm_up and done % self.pipe.scheduler.order == 0
            if done == last or whole:
                self.call.bar.update()

    def _look(self, callback: Callback, run: Run, i: int) -> None:
        """Let the callback see the latents; honour what it does to them and to the pipeline."""
        pipe, slot, call = self.pipe, self.slot, self.call
        version, guided = slot.version, pipe.do_classifier_free_guidance
        latents = run.latents(call.latents.dtype)
        returned = callback(pipe, i, call.timesteps[i], {"latents": latents})
        run.set_latents(returned.pop("latents", latents))  # that very tensor may have been edited
        if pipe.do_classifier_free_guidance != guided:
            raise UserError(
                "callback_on_step_end switched guidance on or off, but left the prompt as it was;"
                " ask for prompt_embeds in callback_on_step_end_tensor_inputs and return them"
            )
        run.guide(*self.guidance)
        unet = self.offer()
        if unet.network is not run.network:
            raise UserError(
                "callback_on_step_end replaced parts of the U-Net; do that between two pictures"
            )
        if (
            slot.version != version
        ):  # its weights changed, and what was computed from them beforehand
            run.condition(hoist(unet.network, call.timesteps, self.conditions(unet)))
