"""Runs the steps of a denoising loop as a plan: noise, callbacks, the progress bar, overflow."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.compiler.inpainting import with_factors
from fastdiff.compiler.loop_call import Call, Callback
from fastdiff.compiler.loop_conditions import carried, check_scales, check_variance
from fastdiff.compiler.predictor import Predictor
from fastdiff.compiler.promotion import overflowed
from fastdiff.compiler.returned import as_tensor, like, listed
from fastdiff.compiler.sharing import Sharing
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.models import Unsupported
from fastdiff.models.checks import channel_axis
from fastdiff.runtime.contents import Standing
from fastdiff.runtime.loop import Mark, Run
from fastdiff.runtime.schedulers import NotLinear, probe, refuse_foreign


class Denoising:
    """A loop that can run as a plan, on `pipe` as it is.

    Raises Unsupported or NotLinear, before anything is drawn, if it cannot.
    """

    def __init__(
        self, pipe: Any, call: Call, sharing: Sharing | None = None, invariant: bool = False
    ) -> None:
        """invariant: as for `Predictor`."""
        share = None if sharing is None else sharing.share(pipe, call)
        call = call if share is None else share.call(call)
        self.pipe, self.call, self.given, self._share = pipe, call, call.conditions, share
        self.scheduler = getattr(pipe, call.plan.scheduler)
        self.predictor = Predictor(pipe, call, share, invariant)
        network, sides = self.predictor.denoiser.network, call.latents.shape[2:]
        back = network.unpack(network.pack(call.latents), sides)
        if back.shape != call.latents.shape:
            size = " x ".join(map(str, sides or call.latents.shape[1:]))
            raise Unsupported(f"latents of {size} do not divide into patches")
        table = probe(self.scheduler, call.step_options, call.timesteps)
        self.table = replace(table, scales=check_scales(call.plan, self.given, table.scales))
        guided, reads = self.predictor.predictions.guided, self.table.variance
        channels = call.latents.shape[channel_axis(call.latents)]
        module: Any = self.predictor.slot.module
        if call.latents.ndim == 3:  # tokens, of patches with this many channels
            channels //= module.config.patch_size**2
        for name in filter(None, (call.plan.network, call.plan.last)):
            slot = slot_of(getattr(pipe, name))
            assert slot is not None  # the predictor has taken it
            check_variance(call.plan, slot.module, self.scheduler, channels, guided, reads)
        if self.table.thresholds and call.latents.ndim == 2:
            raise Unsupported("its scheduler thresholds embeddings, for which diffusers raises")
        if call.callback is not None and self.table.keeps:
            name, kept = type(self.scheduler).__name__, self.table.keeps[0]
            raise Unsupported(f"a callback might read {name}'s {kept}, which a plan does not keep")
        self.inpainting = with_factors(call.inpainting, self.scheduler, self.table, call.plan)
        self.hoisted = self.predictor.hoist(0, self.given)
        self.noises: dict[int, Tensor] = {}
        """Noise drawn since the last mark, by step: a repeated step must not draw again."""
        self.reached = 0
        """Steps that the progress bar has counted."""
        self.latents: Tensor | None = None
        """The latents as the last callback left them."""
        self.handed: dict[str, list[Tensor]] = {}
        """What the last callback returned of `call.handed`."""
        self.left: str | None = None
        """Why the remaining steps are left to diffusers, if they are."""

    def run(self, pause: Callable[[int, int, Tensor], None] | None = None) -> int:
        """Run all steps, or those before the first that only diffusers can run; then `left` is why.

        For diffusers to continue from there, the call's latents are overwritten, as are those of
        its conditions that a callback replaced.

        Args:
            pause: called after each step with how many are done, how many there are and a copy of
                the latents; meanwhile other loops may use the recording.

        Returns:
            How many steps diffusers must skip.
        """
        self._pause = pause
        mark = self._run_from(None)
        while mark is not None:
            self.predictor.take(mark.at, self.given)
            self.hoisted = self.predictor.hoist(mark.at, self.given, goes_on=True)
            mark = self._run_from(mark)
        return len(self.call.timesteps) if self.left is None else self.reached

    @property
    def _guarded(self) -> bool:
        """Whether the steps may overflow, and did not before."""
        half = self.predictor.denoiser.network.dtype == torch.float16
        return half and not overflowed(self.call.latents)

    def _run_from(self, mark: Mark | None) -> Mark | None:
        """Run the steps after a mark, as far as the first one's network predicts and as often as
        for it. Return the mark to go on from, which is an earlier one if float16 overflows."""
        call, predictor = self.call, self.predictor
        guided = predictor.guidance()
        with predictor.plans.start(
            call.latents, self.table, guided, self.hoisted, self.inpainting
        ) as run:
            if mark is not None:
                run.go_back(mark)
            last = self.predictor.end_of_part(run.at)
            right = self._advance(run, last)
            if right is None and run.at == last < len(call.timesteps) and self._goes_on:
                return run.mark()
            if right is None:
                latents = run.latents(call.latents.dtype) if self.latents is None else self.latents
                self.hand_over(latents)
                return None
            where = predictor.first_overflow(lambda: self._repeat(run, right))
        predictor.promote(where)
        return right

    @property
    def _goes_on(self) -> bool:
        interrupted = bool(getattr(self.pipe, "interrupt", False))  # some pipelines have none
        return self.left is None and not interrupted

    def _advance(self, run: Run, last: int) -> Mark | None:
        """Run the steps from `run.at` to `last`. If float16 overflows, return the last mark before
        it."""
        call, guarded = self.call, self._guarded
        mark: Mark | None = None
        while run.at < last and self._goes_on:
            i = run.at
            if guarded and (mark is None or call.callback is not None):
                mark = run.mark()
                self.noises.clear()
            noise = self.noises.get(i)
            if run.draws and noise is None:
                noise = self.draw_noise()
                if guarded:
                    self.noises[i] = noise
            run.advance(noise)
            self.predictor.ran()
            # previews look up their sigma in this state
            vars(self.scheduler).update(self.table.states[i])
            looked_at = call.callback is not None or run.at == last
            if guarded and looked_at and not run.finite():
                return mark
            if call.callback is not None:
                self._run_callback(call.callback, run, i)
            self._show(i)
            if self._pause is not None:
                now = run.latents(call.latents.dtype)
                run.lend(partial(self._pause, run.at, len(call.timesteps), now))
        return None

    def hand_over(self, latents: Tensor) -> None:
        """Write what diffusers continues from into the tensors that its local variables hold."""
        call = self.call
        if self._share is not None:
            latents = self._share.latents(latents)
        halves = len(call.held) // len(latents)
        call.held.data = latents if halves == 1 else torch.cat([latents] * halves)
        for name, values in self.handed.items():
            for own, value in zip(listed(call.handed[name]), values, strict=True):
                own.data = value
        for field in call.plan.replaced.values():
            before, now = getattr(call.conditions, field), getattr(self.given, field)
            if before is not now:
                before.data = now

    def _repeat(self, run: Run, mark: Mark) -> None:
        """Run the steps since `mark` again."""
        last = run.at
        run.go_back(mark)
        while run.at < last:
            run.advance(self.noises.get(run.at))

    def draw_noise(self) -> Tensor:
        """The noise that the scheduler would draw: same generator, same dtype, same order."""
        noise: Tensor = randn_tensor(
            self.call.held.shape,
            generator=self.call.step_options.get("generator"),
            device=self.call.latents.device,
            dtype=self.table.noise_dtype or self.call.latents.dtype,
        )
        if self._share is None:
            return noise[: len(self.call.latents)]
        return self._share.noise(noise[: self._share.pictures])

    def _show(self, i: int) -> None:
        """Advance the progress bar as diffusers does."""
        done, last = i + 1, len(self.call.timesteps)
        if done > self.reached:
            self.reached = done
            order = getattr(self.scheduler, "order", 1)
            whole = done > self.call.warm_up and done % order == 0
            if done == last or whole:
                self.call.bar.update()

    def _run_callback(self, callback: Callback, run: Run, i: int) -> None:
        """Call the callback with the latents; apply its changes to them and to the pipeline."""
        pipe, call, cls = self.pipe, self.call, type(self.pipe)
        version = self.predictor.version
        standing = Standing(self.scheduler)
        latents = run.latents(call.latents.dtype)
        returned = callback(pipe, i, call.timesteps[i], {"latents": latents})
        self.latents = as_tensor("latents", returned.pop("latents", latents))
        if type(pipe) is not cls:
            raise UserError(
                f"callback_on_step_end made the pipeline a {type(pipe).__name__} while it draws;"
                " do that between two pictures"
            )
        self.handed = {
            name: like(name, returned[name], own)
            for name, own in call.handed.items()
            if name in returned
        }
        if self.handed:
            self.left = f"after callback_on_step_end returned {' and '.join(self.handed)}"
        before, self.given = self.given, self._conditions_after(returned)
        if run.at == len(call.timesteps):
            return  # no step follows, so other changes do not matter
        try:
            self._follow(run, standing, changed=before is not self.given, version=version)
        except Unsupported as reason:
            self.left = str(reason)

    def _follow(self, run: Run, standing: Standing, changed: bool, version: int) -> None:
        """Prepare the next step after a callback; Unsupported if only diffusers can run it."""
        pipe, latents, made = self.pipe, self.latents, self.call.latents
        assert latents is not None
        alike = latents.shape == made.shape and latents.dtype == made.dtype
        alike = alike and latents.device == made.device
        _unsupported_if(not alike, "returned latents of another shape, dtype or device")
        for name, field in self.call.plan.replaced.items():
            first, now = getattr(self.call.conditions, field), getattr(self.given, field)
            other = now is not first and now.shape != first.shape
            _unsupported_if(other, f"returned {name} of another shape")
        name, other = self.call.plan.network, self.predictor.replaced()
        _unsupported_if(other is not None, f"replaced the {other}")
        present = getattr(pipe, self.call.plan.scheduler)
        _unsupported_if(present is not self.scheduler, "replaced the scheduler")
        _unsupported_if(not standing.holds(), "changed the scheduler")
        try:
            refuse_foreign(self.scheduler)
        except NotLinear as reason:
            _unsupported_if(True, f"changed the scheduler ({reason})")
        _unsupported_if(self.predictor.switched(), "switched guidance on or off")
        try:
            denoiser = self.predictor.offer(self.given)
        except Unsupported as reason:
            _unsupported_if(True, f"changed the {name} beyond what fastdiff computes ({reason})")
        _unsupported_if(denoiser.network is not run.network, f"replaced parts of the {name}")
        anew = changed or self._uses_ip_adapters or self.predictor.version != version
        end = self.predictor.end_of_part(run.at - 1)
        if anew and run.at < end:
            hoisted = self.predictor.hoist(run.at - 1, self.given)
            what = "switched on an IP-Adapter that was off, or returned other embedding shapes"
            _unsupported_if(not run.takes(hoisted), what)
            run.condition(hoisted)
        run.set_latents(latents)
        run.guide(self.predictor.guidance())

    @property
    def _uses_ip_adapters(self) -> bool:
        """Whether the hoisted values depend on more than the conditions: on IP-Adapter scales."""
        pictures = self.call.plan.pictures
        return bool(pictures) and getattr(self.given, pictures) is not None

    def _conditions_after(self, returned: dict[str, Any]) -> Any:
        """The network's conditions after a callback has returned embeddings."""
        others = carried(self.pipe, self.call.plan)
        others |= {
            field: as_tensor(name, returned[name])
            for name, field in self.call.plan.replaced.items()
            if name in returned and getattr(self.given, field) is not None
        }
        same = all(getattr(self.given, field) is value for field, value in others.items())
        return self.given if same else self.given._replace(**others)


def _unsupported_if(condition: bool, what: str) -> None:
    """Raise Unsupported if a callback did something that only diffusers' loop can follow."""
    if condition:
        raise Unsupported(f"after callback_on_step_end {what}")
