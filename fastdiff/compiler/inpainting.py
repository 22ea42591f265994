"""Inpainting: the part of the given picture that a loop keeps."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler.guidance import Setting, predictions_of
from fastdiff.models import Unsupported
from fastdiff.models.originals import check_own
from fastdiff.plans import Plan
from fastdiff.runtime.guidance import Inpainting
from fastdiff.runtime.recurrence import ALLOWED
from fastdiff.runtime.schedulers import NotLinear, Table

_NAMES = ("mask", "image_latents", "noise")
_ORDERS = {"add_noise": (0, 1, 2), "scale_noise": (0, 2, 1)}
"""The methods that noise a picture, and the order in which they take picture, noise, timestep."""


def inpainting_of(
    pipe: Any, setting: Setting, local: Mapping[str, Any], plan: Plan
) -> Inpainting | None:
    """What a loop with these local variables keeps; its factors are not known yet.

    None if it keeps nothing. Unsupported if a plan cannot do what the loop does with its mask.
    """
    latents = local[plan.latents]
    if plan.kept:
        mask = local[plan.kept]
        _check_kind(plan.kept, mask, latents)
        _check_shape(plan.kept, mask, latents)
        return Inpainting(mask)
    names = (*plan.inverted, "noise") if plan.inverted else _NAMES
    if not plan.noises or (plan.constant_channels and names[1] not in local):
        return None
    if local.get(names[1]) is None:
        raise Unsupported("its network takes mask and picture as further channels")
    missing = [name for name in names if name not in local]
    if missing:
        raise Unsupported(f"this version of diffusers has no {missing[0]} in its loop")
    mask, original, noise = parts = [local[name] for name in names]
    for name, value in zip(names, parts, strict=True):
        _check_kind(name, value, latents)
    if plan.packs:
        original, noise = (pipe._pack_latents(part, *part.shape) for part in (original, noise))
    count = predictions_of(setting).count
    if plan.inverted:
        mask, original = 1 - mask[:1], original[:1]
    elif count > 1 and len(mask) == count * len(latents):
        mask = mask.chunk(count)[0]
    elif hasattr(type(pipe), "do_perturbed_attention_guidance"):
        mask = mask[:1]  # diffusers takes the first of them for all pictures
    for name, value in zip(names, (mask, original, noise), strict=True):
        _check_shape(name, value, latents)
    return Inpainting(mask, original.expand_as(latents), noise.expand_as(latents))


def _check_kind(name: str, value: Any, latents: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype != latents.dtype:
        raise Unsupported(f"its {name} is not a tensor of the latents' dtype")
    if value.device != latents.device:
        raise Unsupported(f"its {name} is on another device than the latents")


def _check_shape(name: str, value: Tensor, latents: Tensor) -> None:
    sizes = zip(value.shape, latents.shape, strict=False)
    if value.ndim != latents.ndim or any(side not in (1, whole) for side, whole in sizes):
        raise Unsupported(
            f"its {name} has the shape {list(value.shape)}, the latents {list(latents.shape)}"
        )


def with_factors(
    inpainting: Inpainting | None, scheduler: Any, table: Table, plan: Plan
) -> Inpainting | None:
    """`inpainting` with the factors of picture and noise after each step, as the scheduler's own
    method makes them.

    Raises:
        NotLinear: its steps do not follow samples that change between them, or it noises the
            picture in another way than by two factors.
        Unsupported: that method is not diffusers' own.
    """
    if inpainting is None:
        return None
    name = type(scheduler).__name__
    if not table.editable:
        raise NotLinear(f"{name}: its table does not follow samples that a mask changes")
    if inpainting.original is None:
        return inpainting
    if not hasattr(scheduler, plan.noises):
        raise NotLinear(f"{name}: it has no {plan.noises}")
    check_own(scheduler, (plan.noises,))
    own = copy.deepcopy(scheduler)
    for key, value in vars(own).items():
        if isinstance(value, Tensor):
            setattr(own, key, value.cpu())
    picture, noise = torch.tensor([[1.0, 0.0, 0.3], [0.0, 1.0, -0.7]], dtype=torch.float64)
    timesteps, order = table.timesteps, _ORDERS[plan.noises]
    rows = []
    for state, timestep in zip(table.states, timesteps[1:], strict=False):
        vars(own).update(state)
        given = (picture.view(3, 1, 1, 1), noise.view(3, 1, 1, 1), timestep[None])
        made = getattr(own, plan.noises)(*(given[i] for i in order)).flatten()
        if not abs(made[2] - made[:2] @ torch.stack([picture, noise])[:, 2]) <= ALLOWED:
            raise NotLinear(f"{name}: its {plan.noises} is not a sum of picture and noise")
        rows.append(made[:2].double())
    rows.append(torch.tensor([1.0, 0.0], dtype=torch.float64))  # after the last step
    return inpainting._replace(factors=torch.stack(rows))
