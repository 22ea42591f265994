"""Pipelines that enlarge a picture: their picture's size follows from that of their input."""

import inspect
from typing import Any

import torch

from fastdiff.recipes import denoiser


def enlarges(pipe: Any) -> bool:
    """Whether its call takes a picture to encode but no height and width."""
    takes = inspect.signature(pipe.__call__).parameters
    encodes = getattr(pipe, "vae", None) is not None
    return encodes and "image" in takes and "height" not in takes


def size_of(pipe: Any, height: int, width: int) -> dict[str, Any]:
    """The arguments of its call for a picture of that size, in pixels."""
    if not enlarges(pipe):
        return {"height": height, "width": width}
    factor, generator = pipe.vae_scale_factor, torch.Generator().manual_seed(0)
    small = torch.rand(1, 3, height // factor, width // factor, generator=generator)
    return {"image": small}


def channels_of(pipe: Any) -> int:
    """The channels of its latents; its network may also take an input picture's channels."""
    config = denoiser(pipe).config
    return int(config.out_channels if enlarges(pipe) else config.in_channels)
