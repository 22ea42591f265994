"""Reads a denoising loop that is about to begin from diffusers' local variables."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from fastdiff.compiler.controls import LOCALS, PICTURE
from fastdiff.compiler.guidance import ASKED, SkipLayers, predictions_of, skip_layers_of
from fastdiff.compiler.inpainting import inpainting_of
from fastdiff.compiler.loop_conditions import conditions_of, settings_of
from fastdiff.families import family
from fastdiff.models import Unsupported
from fastdiff.models.checks import refuse
from fastdiff.models.originals import own_helper, own_method
from fastdiff.plans import Plan
from fastdiff.recipes import packages_of, recipe_of
from fastdiff.runtime.guidance import Inpainting
from fastdiff.runtime.trajectory import following

Callback = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """A loop that is about to begin. The pipeline's settings are read from the pipeline itself."""

    latents: Tensor
    """[B, …]"""
    held: Tensor
    """The tensor in the loop's variable: the latents, for some loops repeated for the other half
    of guidance. The result is written into it."""
    conditions: Any
    """The network's conditions, of its family's class."""
    plan: Plan
    settings: Mapping[str, Any]
    """The pipeline's settings that are variables of its call, by the property's name."""
    timesteps: Tensor
    step_options: Mapping[str, Any]
    """Further arguments of the scheduler's `step`, such as the generator."""
    bar: Any
    warm_up: int
    """Extra steps of a higher-order scheduler, which do not move the progress bar."""
    callback: Callback | None
    """`callback_on_step_end`, which receives the latents."""
    skips: SkipLayers | None = None
    inpainting: Inpainting | None = None
    """What the steps keep; its factors depend on the scheduler's table and are not set yet."""
    handed: Mapping[str, Tensor | list[Tensor]] = field(default_factory=dict)
    """Other variables that a callback may replace, which only diffusers' loop can follow."""

    def setting(self, pipe: Any, name: str, otherwise: Any) -> Any:
        """A setting of the call by `pipe`; some pipelines have no such setting."""
        return self.settings[name] if name in self.settings else getattr(pipe, name, otherwise)


_LOCALS = (
    *("timesteps", "num_warmup_steps"),
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)
"""Local variables of diffusers' `__call__` that a plan needs if the loop asks for `interrupt`;
recipes name the others."""


def call_of(
    pipe: Any,
    plan: Plan,
    local: Mapping[str, Any],
    helpers: Mapping[str, Any],
    bar: Any,
    timesteps: Tensor | None = None,
) -> Call:
    """The loop that is about to begin.

    Args:
        plan: the loop's, of the pipeline's recipe.
        local: the local variables of its frame.
        helpers: the globals of its module.
        bar: its progress bar, or None.
        timesteps: what the bar iterates over, if the loop has no variable for its timesteps.

    Raises:
        Unsupported: only diffusers itself can run it.
    """
    recipe, own = recipe_of(pipe), partial(own_method, pipe, packages=packages_of(pipe))
    assert recipe is not None
    options = (plan.step_options,) if plan.step_options else plan.step_arguments
    asks = plan.entrance == "interrupt"
    always = _LOCALS if asks else () if plan.iterates else ("timesteps",)
    others = (*plan.required, *plan.settings.values(), *plan.constant_channels)
    kept = (plan.kept,) if plan.kept else ()
    controls = LOCALS if plan.controls else ()
    wanted = (plan.latents, *always, *options, *others, *kept, *controls)
    missing = [name for name in wanted if name not in local]
    if missing:
        raise Unsupported(f"this version of diffusers has no {missing[0]} in its loop")
    if bar is None:
        raise Unsupported("this version of diffusers has no progress_bar in its loop")
    if asks and local.get("i", 0) != 0:
        raise Unsupported("this version of diffusers reads `interrupt` only after its first step")
    kind = type(getattr(pipe, plan.scheduler)).__name__
    if plan.schedulers and kind not in plan.schedulers:
        raise Unsupported(f"its loop needs two results of {kind}'s step; a plan has one")
    if plan.many_steps and local["num_inference_steps"] == 1:
        raise Unsupported("a loop of one step takes another result of it; a plan has one")
    for name in ("prepare_latents", "prepare_intermediate_images"):
        if hasattr(type(pipe), name) and not own(name):
            raise Unsupported(f"its {name} was replaced and may keep the latents it returns")
    for name in (*ASKED, plan.attention_kwargs):
        if hasattr(type(pipe), name) and not own(name):
            raise Unsupported(f"its {name} was replaced and may change from step to step")
    if plan.packs and not own("_pack_latents"):
        raise Unsupported("its _pack_latents was replaced")
    rescale = helpers.get("rescale_noise_cfg")
    if rescale is not None and not own_helper(rescale, "rescale_noise_cfg"):
        raise Unsupported("rescale_noise_cfg was replaced")
    callback = local.get("callback_on_step_end")
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        raise Unsupported(f"a {type(callback).__name__} may change anything between the steps")
    if callback is not None and local.get("callback_on_step_end_tensor_inputs") != ["latents"]:
        raise Unsupported("callback_on_step_end asks for more than the latents")
    held = local[plan.latents]
    if plan.float32 and held.dtype != torch.float32:
        raise Unsupported(f"its latents are {held.dtype}, and its steps return float32")
    same = [name for name, value in local.items() if value is held and name != plan.latents]
    if callback is not None and same:
        raise Unsupported(
            f"its latents are also its {same[0]}, so diffusers could not resume from them"
        )
    if callback is not None and not asks:
        raise Unsupported("after callback_on_step_end it could not resume in mid-loop")
    settings = settings_of(plan, local)
    predictions = predictions_of(lambda name, other: settings.get(name, getattr(pipe, name, other)))
    guided = predictions.guided
    if callback is not None and not guided and not own("encode_prompt"):
        raise Unsupported("its encode_prompt was replaced and may keep the embeddings it returns")
    if callback is not None and guided and plan.unconditional:
        raise Unsupported("a callback may replace one half of the network's conditions")
    refuse(callback=local.get("callback"), **{name: local.get(name) for name in plan.absent})
    for name, asks_more in plan.refused.items():
        if asks_more(local.get(name)):
            raise Unsupported(f"it was given {name} of {local.get(name)}")
    denoised = family(recipe.networks[plan.network]).denoised
    assert denoised is not None
    given = conditions_of(pipe, getattr(pipe, plan.network), plan, local, predictions)
    if callback is not None and any(isinstance(given[f], list) for f in plan.replaced.values()):
        raise Unsupported("a callback may replace a list of the network's conditions")
    steps = local["timesteps"] if timesteps is None else timesteps
    told = {name: local[name] for name in plan.step_arguments}
    if plan.prev_timestep:
        told["prev_timestep"] = following(steps)
    doubled = plan.doubled and guided
    call = Call(
        latents=held.chunk(2)[0] if doubled else held,
        held=held,
        conditions=denoised.conditions(**given),
        plan=plan,
        settings=settings,
        timesteps=steps,
        step_options=local[plan.step_options] if plan.step_options else told,
        bar=bar,
        warm_up=local.get("num_warmup_steps", 0),
        callback=callback,
    )
    setting = partial(call.setting, pipe)
    handed = (*plan.constant_channels, *(("mask",) if plan.noises else ()))
    handed += (PICTURE,) if plan.controls else ()
    return replace(
        call,
        skips=skip_layers_of(setting, local, plan),
        inpainting=inpainting_of(pipe, setting, local, plan),
        handed={name: local[name] for name in handed if asks and not plan.only_read},
    )
