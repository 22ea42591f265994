"""Random requests for the demo, and the pipeline's own call for one."""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
from torch import Tensor

from fastdiff.batching import Request
from fastdiff.demo import PROMPTS

SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),
    *("LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
)
CAPACITY = 4


def requests(
    pipe: Any, count: int, seed: int, least: int = 5, most: int = 50, unguided: float = 0.0
) -> Iterator[tuple[Request, float]]:
    """Random requests, each with the seconds to wait before it; a share of them `unguided`."""
    chosen = random.Random(seed)
    for number in range(count):
        name = chosen.choice(SCHEDULERS)
        kind = getattr(diffusers, name)
        request = Request(
            prompt=chosen.choice(PROMPTS),
            negative_prompt=chosen.choice([None, None, "dark"]),
            num_inference_steps=chosen.randint(least, most),
            # at 1 and below there is no guidance: another recording
            guidance_scale=1.0 if chosen.random() < unguided else chosen.uniform(1.5, 6),
            seed=seed * 1_000_000 + number,
            scheduler=kind.from_config(pipe.scheduler.config, skip_prk_steps=True),
        )
        yield request, chosen.choice([0.0, 0.0, 0.02, 0.1])


def called(
    pipe: Any,
    request: Request,
    after: Callable[[int, Tensor], Tensor] | None = None,
    output_type: str = "latent",
) -> Any:
    """The pipeline's own call for a request: latents [1, C, Y, X], or what `output_type` says.

    after: called after each step with its number, from 0, and the latents; returns those with
        which the next one goes on.
    """

    def told(_: Any, step: int, time: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        assert after is not None
        return {"latents": after(step, given["latents"])}

    before = pipe.scheduler
    pipe.scheduler = copy.deepcopy(request.scheduler or before)
    try:
        return pipe(
            request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            output_type=output_type,
            callback_on_step_end=None if after is None else told,
        ).images
    finally:
        pipe.scheduler = before
