"""Pipelines that draw pixels, without a text and an autoencoder: DDPM's and consistency models."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from fastdiff.errors import UserError
from fastdiff.recipes import autoencoder, denoiser

PARTS = {"unet", "scheduler"}


def draws_pixels(pipe: Any) -> bool:
    """Whether it has a network and a scheduler, and nothing else."""
    return set(pipe.components) == PARTS


def decodes_with(pipe: Any) -> Any:
    """The autoencoder of a pipeline, which fastdiff need not compute, or None."""
    known = autoencoder(pipe)
    return getattr(pipe, "vae", None) if known is None else known


def drawn(pipe: Any, steps: int, seed: int) -> torch.Tensor:
    """One picture, [H, W, 3] float64 in [0, 1]; with a class embedding, of class 0."""
    if denoiser(pipe).dtype == torch.bfloat16:
        raise UserError(
            f"a {type(pipe).__name__} of diffusers returns no bfloat16 picture; give --dtype fp32"
            " or, on a GPU, fp16"
        )
    labelled = getattr(denoiser(pipe).config, "num_class_embeds", None) is not None
    images = pipe(
        batch_size=1,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
        **({"class_labels": 0} if labelled else {}),
    ).images
    return torch.from_numpy(images[0]).double()


@contextmanager
def noise_as(pipe: Any, dtype: torch.dtype) -> Iterator[None]:
    """In this block, a pipeline that draws its noise itself in float64 draws it in `dtype`: in
    float64 the same generator would give other numbers."""
    schedulers = [part for name, part in pipe.components.items() if name.endswith("scheduler")]
    modules = {inspect.getmodule(type(one)) for one in (pipe, *schedulers)}
    found: Any = [module for module in modules if hasattr(module, "randn_tensor")]
    own = [module.randn_tensor for module in found]

    def draw(*args: Any, **options: Any) -> torch.Tensor:
        wanted = options.pop("dtype", None) or torch.get_default_dtype()
        drawn_in = dtype if wanted == torch.float64 else wanted
        made: torch.Tensor = own[0](*args, **options, dtype=drawn_in)
        return made.to(wanted)

    patches = [patch.object(module, "randn_tensor", draw) for module in found]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()
