"""The conditions that a loop passes to its network, and the loop's guidance."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler.controls import controls_of, distilled_guidance
from fastdiff.compiler.guidance import Predictions
from fastdiff.models import Unsupported
from fastdiff.models.blocks import require
from fastdiff.models.checks import channel_axis
from fastdiff.plans import Plan


def settings_of(plan: Plan, local: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are variables of the loop, by the name of a pipeline's property."""
    found = {name: local[variable] for name, variable in plan.settings.items()}
    if "guidance_scale" in found:
        scale = found["guidance_scale"]
        guided = scale > 1.0 if plan.only_above_one else scale != 1.0
        found.setdefault("do_classifier_free_guidance", guided)
    return found


def conditions_of(
    pipe: Any, network: Any, plan: Plan, local: Mapping[str, Any], predictions: Predictions
) -> dict[str, Any]:
    """The network's conditions by field.

    Args:
        network: diffusers' own.
        local: the loop's variables.
        predictions: those of a step.

    It compares the entries of conditions that loops repeat, so it waits for a GPU once.
    """
    given: dict[str, Any] = {field: local.get(name) for field, name in plan.conditions.items()}
    guided = predictions.guided
    for field, name in plan.instead.items():
        if given[field] is None:
            given[field] = local.get(name)
    for field, name in plan.unconditional.items() if guided else ():
        if name not in local:
            raise Unsupported(f"this version of diffusers has no {name} in its loop")
        halves = local[name], given[field]
        halves = (halves[1], halves[0]) if plan.conditional_first else halves
        if field == plan.pictures:  # a list, with an entry for each adapter
            given[field] = _both_pictures(name, *halves)
        else:
            given[field] = _both(name, *halves)
    for field, name in plan.alike.items() if guided else ():
        told = local.get(name)
        require(told is not None and torch.equal(told, given[field]), f"{name} of its own")
    for field in plan.repeated:
        given[field] = _once(given[field])
    latents = local[plan.latents]
    axis = channel_axis(latents)
    own = latents.shape[axis]
    if plan.constant_channels and (plan.always or network.config.in_channels > own):
        constant = torch.cat([local[name] for name in plan.constant_channels], dim=axis)
        # channels that are scaled with the latents are repeated with them
        whole = len(latents) * (1 if plan.scaled == "input" else predictions.count)
        require(len(constant) == whole, f"constant channels of {len(constant)} for {whole} inputs")
        given["constant_channels"] = _shared(constant, guided, len(latents))
    if plan.distilled:
        given["guidance"] = distilled_guidance(network, local[plan.distilled], latents)
    if plan.controls:
        given["controls"] = controls_of(pipe, plan, local, guided)
    return given | carried(pipe, plan) | dict(plan.fixed)


def _both(name: str, first: Any, second: Any) -> Any:
    """Both halves of the network's conditions, tensors [B, …] or lists."""
    if isinstance(first, list) and isinstance(second, list):
        return first + second
    require(first.shape == second.shape, f"{name} of another shape than the other half's")
    return torch.cat([first, second])


def _both_pictures(name: str, first: Any, second: Any) -> Any:
    """Both halves of the IP-Adapters' embeddings, lists of [B, N, …]; None without any."""
    if first is None and second is None:
        return None
    require(None not in (first, second), f"{name} of one half only")
    return [_both(name, *parts) for parts in zip(first, second, strict=True)]


def carried(pipe: Any, plan: Plan) -> dict[str, Any]:
    """The conditions that `pipe` now passes to its network among the attention kwargs."""
    if not plan.pictures or plan.pictures in plan.conditions:
        return {}
    return {plan.pictures: (getattr(pipe, plan.attention_kwargs) or {}).get(plan.pictures)}


def check_scales(plan: Plan, given: Any, scales: Tensor) -> Tensor:
    """The scales of the network's latents, for a scheduler that would scale its input by `scales`.

    Raises Unsupported if the loop scales constant channels by a factor of each step.
    """
    if not plan.scaled:
        return torch.ones_like(scales)
    if plan.scaled == "sample":
        require(bool((scales == 1).all()), "its scheduler steps the scaled latents")
    whole = plan.scaled == "input" and given.constant_channels is not None
    if whole and bool((scales != 1).any()):
        raise Unsupported("its scheduler scales the constant channels in every step")
    return scales


def check_variance(
    plan: Plan, network: Any, scheduler: Any, channels: int, guided: bool, reads: bool
) -> None:
    """Raise Unsupported unless a step takes the channels that the network gives.

    Args:
        network, scheduler: diffusers' own.
        channels: those of the latents.
        guided: whether there is classifier-free guidance.
        reads: whether the scheduler reads a variance.
    """
    given = getattr(getattr(network, "config", None), "out_channels", None) or channels
    if given != 2 * channels:
        require(given == channels, f"{given} channels are predicted for {channels} of the latents")
        require(not reads, "the scheduler reads a variance that the network does not give")
    elif plan.drops_variance:
        require(not reads, "the scheduler reads a variance that the loop drops")
    elif plan.variance:
        said = getattr(getattr(scheduler, "config", None), "variance_type", None)
        what = "the loop reads a variance_type of the scheduler's config, which has none"
        require(said is not None or plan.variance != "asked", what)
        named = plan.variance == "kept" or said in ("learned", "learned_range")
        require(reads or not named, "the scheduler is given a variance and does not read it")
    else:
        what = "the loop guides the network's variance, or the scheduler ignores it"
        require(reads and not guided, what)


def _once(value: Tensor | None) -> Tensor | None:
    """One entry if all are the same."""
    if value is None or not bool((value == value[:1]).all()):
        return value
    return value[:1]


def _shared(value: Tensor, guided: bool, count: int) -> Tensor:
    """The first half if guidance has that of `count` pictures twice."""
    twice = guided and len(value) == 2 * count
    return value[:count] if twice and torch.equal(value[:count], value[count:]) else value
