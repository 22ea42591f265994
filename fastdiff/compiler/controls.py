"""The ControlNets that run in the steps of a loop: which they are, and what they are told."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler.slot import Slot, slot_of
from fastdiff.models.blocks import require
from fastdiff.models.flux_control import Control, ControlConditions
from fastdiff.models.originals import own_method
from fastdiff.models.watch import hooks, kind
from fastdiff.plans import Plan

PICTURE = "control_image"
LOCALS = (
    *(PICTURE, "control_mode", "controlnet_conditioning_scale", "controlnet_keep"),
    *("controlnet_blocks_repeat", "guidance_scale"),
)
"""Local variables that a loop with ControlNets has."""
_TEXTS = "encoder_hidden_states", "pooled_projections"
_SEVERAL = "FluxMultiControlNetModel"


def distilled_guidance(network: Any, scale: Any, latents: Tensor) -> Tensor | None:
    """[B] the distilled guidance that a loop tells a network of diffusers, if it embeds one."""
    if not network.config.guidance_embeds:
        return None
    require(isinstance(scale, int | float), f"guidance_scale is a {type(scale).__name__}")
    return torch.tensor([scale], device=latents.device).expand(len(latents))


def controls_of(
    pipe: Any, plan: Plan, local: Mapping[str, Any], guided: bool
) -> tuple[Control, ...]:
    """What each ControlNet of a loop with these local variables is told; () without any.

    Raises Unsupported where only diffusers' loop does what they ask for, or raises.
    """
    if not plan.controls:
        return ()
    nets, latents = _listed(getattr(pipe, plan.controls)), local[plan.latents]
    guidance = distilled_guidance(nets[0], local["guidance_scale"], latents)
    # without a half of its own, its text is the transformer's
    text, pooled = (local[plan.conditions[name]] if guided else None for name in _TEXTS)
    scales = _scales(local, len(local["timesteps"]))
    pictures, modes = local[PICTURE], local["control_mode"]
    if kind(getattr(pipe, plan.controls)) != _SEVERAL:
        pictures, modes = [pictures], [modes]
    else:
        modes = [mode[:, None] for mode in modes]
    count = min(len(pictures), len(modes), len(scales), len(nets) if len(nets) > 1 else len(scales))
    require(count > 0, "ControlNets without a picture or a scale")
    return tuple(
        Control(ControlConditions(text, pooled, None, None, guidance, picture, mode), by_step)
        for picture, mode, by_step, _ in zip(pictures, modes, scales, range(count), strict=False)
    )


def counting(given: Any, at: int) -> tuple[int, ...]:
    """Which of the `controls` in a network's conditions add anything in step `at`."""
    controls = getattr(given, "controls", ())
    return tuple(i for i, one in enumerate(controls) if one.scales[at])


def end_of_counting(given: Any, at: int, count: int) -> int:
    """The first of `count` steps after step `at` in which others count, or `count`."""
    now = counting(given, at)
    return next((i for i in range(at + 1, count) if counting(given, i) != now), count)


def slots_of(pipe: Any, plan: Plan, given: Any) -> tuple[Slot, ...]:
    """The slots of a loop's ControlNets, one for each of the `controls` in its network's
    conditions; Unsupported if a ControlNet is not compiled."""
    if not plan.controls:
        return ()
    controls, component = given.controls, getattr(pipe, plan.controls)
    if kind(component) == _SEVERAL:
        hooks([component])
        require(own_method(component, "forward"), f"the forward of {plan.controls} was replaced")
    nets = _listed(component)
    # diffusers gives all pictures to a ControlNet that is alone
    slots = [slot_of(net) for net in (nets if len(nets) > 1 else nets * len(controls))]
    found = [slot for slot, _ in zip(slots, controls, strict=False) if slot is not None]
    require(len(found) == len(controls), f"the {plan.controls} is not compiled")
    return tuple(found)


def counts_of(nets: Sequence[Any]) -> tuple[int, int]:
    """How many residuals of the first blocks, and of the others, diffusers adds of several
    ControlNets: as many as all give, but for those that give none; none if the first gives none."""
    first, others = zip(*(net.counts for net in nets), strict=True)
    return _common(first), _common(others)


def _common(counts: Sequence[int]) -> int:
    return min(count for count in counts if count) if counts[0] else 0


def _listed(component: Any) -> list[Any]:
    return list(component.nets) if kind(component) == _SEVERAL else [component]


def _scales(local: Mapping[str, Any], steps: int) -> list[tuple[float, ...]]:
    """By ControlNet, what its residuals are multiplied by in each step."""
    scale, keep = local["controlnet_conditioning_scale"], local["controlnet_keep"]
    require(len(keep) == steps, "a version of diffusers that keeps ControlNets by other steps")
    if isinstance(keep[0], list):
        require(isinstance(scale, list | tuple), "one controlnet_conditioning_scale for several")
        by_net = [(one, [row[i] for row in keep]) for i, one in enumerate(scale[: len(keep[0])])]
    else:
        by_net = [(scale[0] if isinstance(scale, list) else scale, keep)]
    for one, _ in by_net:
        known = isinstance(one, int | float)
        require(known, f"controlnet_conditioning_scale is a {type(one).__name__}")
    return [tuple(one * kept for kept in row) for one, row in by_net]
