"""All steps of one denoising loop on the plan: noise, callbacks, the progress bar, overflow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.compiler.promotion import as_type, first_overflow, overflowed
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.kernels.observe import entered
from fastdiff.models import Unsupported
from fastdiff.models.hoisted import Hoisted
from fastdiff.recipes import Plan
from fastdiff.runtime.contents import Standing
from fastdiff.runtime.denoiser import Denoiser
from fastdiff.runtime.loop import Mark, Run
from fastdiff.runtime.schedulers import NotLinear, probe, refuse_foreign

Callback = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """A loop about to begin. What its pipeline is set to is read from the pipeline."""

    network: str
    """The pipeline's component that the loop repeats."""
    latents: Tensor
    """[B, C, Y, X]; the result replaces its values."""
    conditions: Any
    """Those of the network's family."""
    plan: Plan
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
        slot = slot_of(getattr(pipe, call.network))
        if slot is None:
            raise Unsupported(f"the {call.network} is not compiled")
        self.pipe, self.slot, self.call, self.given = pipe, slot, call, call.conditions
        self.scheduler, self.guided = pipe.scheduler, pipe.do_classifier_free_guidance
        self.denoiser = self._offer()
        network, sides = self.denoiser.network, call.latents.shape[2:]
        back = network.unpack(network.pack(call.latents), sides)
        if back.shape != call.latents.shape:
            raise Unsupported(f"latents of {sides[0]} x {sides[1]} are no whole patches")
        self.table = probe(pipe.scheduler, call.step_options, call.timesteps)
        if call.callback is not None and self.table.keeps:
            name, kept = type(pipe.scheduler).__name__, self.table.keeps[0]
            raise Unsupported(f"a callback might look at what {name} keeps in its {kept}")
        self.hoisted = self._hoist()
        self.noises: dict[int, Tensor] = {}
        """What was drawn since the last mark, by step: repeated steps must not draw again."""
        self.reached = 0
        """Steps that the progress bar has seen."""
        self.latents: Tensor | None = None
        """What the last callback made of the latents."""
        self.left: str | None = None
        """Why the plan left the rest of the steps to diffusers."""

    def run(self) -> int:
        """All steps, or those up to one that only diffusers can take, where `left` says why.

        What diffusers is to go on from replaces the call's latents, and its conditions where a
        callback returned others.

        Returns:
            How many steps diffusers is to pass over.
        """
        guarded = self.denoiser.network.dtype == torch.float16 and not overflowed(self.call.latents)
        mark = self._run_from(None, guarded)
        if mark is not None:
            self._run_from(mark, guarded=False)
        return len(self.call.timesteps) if self.left is None else self.reached

    def _run_from(self, mark: Mark | None, guarded: bool) -> Mark | None:
        """All steps from a mark on; where float16 overflowed, the mark to go on from in float32."""
        call, plans = self.call, self.denoiser.plans
        with plans.start(call.latents, self.table, self._guidance(), self.hoisted) as run:
            if mark is not None:
                run.go_back(mark)
            right = self._advance(run, guarded)
            if right is None:
                self._hand_over(run)
                return None
            where = "the engine"
            if not self.slot.kind.frozen:
                where = first_overflow(self.slot.module, lambda: self._repeat(run, right))
        self.slot.promote(where, self._scale())
        self.denoiser = self._offer()
        self.hoisted = self._hoist()
        return right

    def _advance(self, run: Run, guarded: bool) -> Mark | None:
        """Steps from `run.at` on; a mark to go back to if float16 overflowed after it."""
        call, count = self.call, len(self.call.timesteps)
        mark: Mark | None = None
        while run.at < count and self.left is None and not self._interrupted:
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
            vars(self.scheduler).update(self.table.states[i])  # previews look up their sigma by it
            looked_at = call.callback is not None or run.at == count
            if guarded and looked_at and not run.finite():
                return mark
            if call.callback is not None:
                self._look(call.callback, run, i)
            self._show(i)
        return None

    @property
    def _interrupted(self) -> bool:
        return bool(getattr(self.pipe, "interrupt", False))  # some pipelines have none

    def _hand_over(self, run: Run) -> None:
        """Give diffusers what it goes on from, in the tensors that it has in its variables."""
        call = self.call
        latents = run.latents(call.latents.dtype) if self.latents is None else self.latents
        call.latents.data = latents
        for field in call.plan.replaced.values():
            before, now = getattr(call.conditions, field), getattr(self.given, field)
            if before is not now:
                before.data = now

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
        pipe, call, version, cls = self.pipe, self.call, self.slot.version, type(self.pipe)
        standing = Standing(self.scheduler)
        latents = run.latents(call.latents.dtype)
        returned = callback(pipe, i, call.timesteps[i], {"latents": latents})
        self.latents = _tensor("latents", returned.pop("latents", latents))
        if type(pipe) is not cls:
            raise UserError(
                f"callback_on_step_end made the pipeline a {type(pipe).__name__}, while it draws;"
                " do that between two pictures"
            )
        before, self.given = self.given, self._told(returned)
        if run.at == len(call.timesteps):
            return  # whatever else it changed, no step follows
        try:
            self._follow(run, standing, changed=before is not self.given, version=version)
        except Unsupported as reason:
            self.left = str(reason)

    def _follow(self, run: Run, standing: Standing, changed: bool, version: int) -> None:
        """Take the next step as a callback wants it; Unsupported where only diffusers can."""
        pipe, latents, made = self.pipe, self.latents, self.call.latents
        assert latents is not None
        alike = latents.shape == made.shape and latents.dtype == made.dtype
        _leave(not alike or latents.device != made.device, "gave other latents than it was given")
        for name, field in self.call.plan.replaced.items():
            first, now = getattr(self.call.conditions, field), getattr(self.given, field)
            _leave(now is not first and now.shape != first.shape, f"gave {name} of another shape")
        name = self.call.network
        _leave(slot_of(getattr(pipe, name)) is not self.slot, f"replaced the {name}")
        _leave(pipe.scheduler is not self.scheduler, "replaced the scheduler")
        _leave(not standing.holds(), "changed the scheduler")
        try:
            refuse_foreign(self.scheduler)
        except NotLinear as reason:
            _leave(True, f"changed the scheduler ({reason})")
        _leave(pipe.do_classifier_free_guidance != self.guided, "switched guidance on or off")
        try:
            denoiser = self._offer()
        except Unsupported as reason:
            _leave(True, f"changed the {name} beyond what fastdiff computes ({reason})")
        _leave(denoiser.network is not run.network, f"replaced parts of the {name}")
        if changed or self._adapted or self.slot.version != version:
            hoisted = self._hoist()
            what = (
                "switched on an IP-Adapter that was off, or gave pictures or texts of another form"
            )
            _leave(not run.takes(hoisted), what)
            run.condition(hoisted)
        run.set_latents(latents)
        run.guide(*self._guidance())

    @property
    def _adapted(self) -> bool:
        """Whether what is hoisted depends on more than the conditions: on IP-Adapters' scales."""
        pictures = self.call.plan.pictures
        return bool(pictures) and getattr(self.given, pictures) is not None

    def _told(self, returned: dict[str, Any]) -> Any:
        """What the network is told once a callback has returned embeddings."""
        others = carried(self.pipe, self.call.plan)
        others |= {
            field: _tensor(name, returned[name])
            for name, field in self.call.plan.replaced.items()
            if name in returned and getattr(self.given, field) is not None
        }
        same = all(getattr(self.given, field) is value for field, value in others.items())
        return self.given if same else self.given._replace(**others)

    def _guidance(self) -> tuple[float, float]:
        """Scale and rescale as the pipeline has them now; diffusers ignores a negative rescale."""
        rescale = float(getattr(self.pipe, "guidance_rescale", 0.0))
        return float(self.pipe.guidance_scale), max(0.0, rescale)

    def _scale(self) -> float:
        """What the call multiplies LoRA adapters by."""
        name = self.call.plan.attention_kwargs
        return self.slot.kind.scale(**({name: getattr(self.pipe, name)} if name else {}))

    def _offer(self) -> Denoiser:
        denoiser: Denoiser = self.slot.offer(self.call.latents, self.given, scale=self._scale())
        if self.slot.promotion is None:
            copies = 2 if self.guided else 1
            denoiser.network.check(self.call.latents, self.given, copies)
        return denoiser

    def _hoist(self) -> Hoisted:
        """What is computed once; in the network's own dtype where it was promoted."""
        network, latents, given = self.denoiser.network, self.call.latents, self.given
        if self.slot.promotion is not None:
            given = as_type(given, torch.float16, network.dtype)
        timesteps = self.call.timesteps.to(latents.device)[:, None]
        sides = (latents.shape[2], latents.shape[3])
        return entered("hoist", lambda: network.hoist(given, timesteps, sides))


def carried(pipe: Any, plan: Plan) -> dict[str, Any]:
    """The conditions that `pipe` gives its network among the attention kwargs, as they are now."""
    if not plan.pictures or plan.pictures in plan.conditions:
        return {}
    return {plan.pictures: (getattr(pipe, plan.attention_kwargs) or {}).get(plan.pictures)}


def _tensor(name: str, value: Any) -> Tensor:
    """`value`, which a callback returned as `name`."""
    if not isinstance(value, Tensor):
        raise UserError(
            f"callback_on_step_end returned a {type(value).__name__} as {name}; return a tensor"
        )
    return value


def _leave(condition: bool, what: str) -> None:
    """Raise Unsupported where a callback did what only diffusers' loop can follow."""
    if condition:
        raise Unsupported(f"after callback_on_step_end {what}")
