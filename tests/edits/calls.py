"""Edits of the scheduler and of the attention processors."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import Tensor

from edits.functions import around
from edits.recorded import of_class
from edits.table import Edit, add, edits
from edits.twins import Twin, original

# Schedulers


def another_scheduler(own: Any, **options: Any) -> Callable[[Any], None]:
    def apply(pipe: Any) -> None:
        pipe.scheduler = own.from_config(pipe.scheduler.config, **options)

    return apply


NEEDS_MORE = {"DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"}
"""Schedulers that need packages which are not installed."""

MORE: dict[str, dict[str, Any]] = {"PNDMScheduler": {"skip_prk_steps": True}}
for _own in sorted(original().scheduler.compatibles, key=lambda own: own.__name__):
    if _own.__name__ not in NEEDS_MORE:
        edits("scheduler", {_own.__name__: another_scheduler(_own, **MORE.get(_own.__name__, {}))})
edits(
    "scheduler",
    {
        "LCM": another_scheduler(diffusers.LCMScheduler),
        "clipped": another_scheduler(DDIMScheduler, clip_sample=True),
        "v-prediction": another_scheduler(DDIMScheduler, prediction_type="v_prediction"),
        "prediction of the sample": another_scheduler(DDIMScheduler, prediction_type="sample"),
        "leading": another_scheduler(DDIMScheduler, timestep_spacing="leading"),
        "zero SNR": another_scheduler(DDIMScheduler, rescale_betas_zero_snr=True),
        "thresholding": another_scheduler(DDIMScheduler, thresholding=True),
        "config in place": lambda pipe: pipe.scheduler.register_to_config(
            prediction_type="v_prediction"
        ),
        "alphas in place": lambda pipe: pipe.scheduler.alphas_cumprod.mul_(0.9),
        "alphas": lambda pipe: setattr(
            pipe.scheduler, "alphas_cumprod", pipe.scheduler.alphas_cumprod**1.1
        ),
        "final alpha": lambda pipe: setattr(
            pipe.scheduler, "final_alpha_cumprod", torch.tensor(0.9)
        ),
        "init_noise_sigma": lambda pipe: setattr(pipe.scheduler, "init_noise_sigma", 1.1),
    },
)


def noted(twin: Twin, own: Any, damps: bool) -> Any:
    """A user's scheduler class that stores the inputs of `step`; it may scale the prediction."""

    class Noting(own):
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **rest: Any) -> Any:
            twin.seen.append((type(model_output).__name__, model_output.clone(), int(timestep)))
            if damps:
                model_output = model_output * 0.9
            return super().step(model_output, timestep, sample, **rest)

    Noting.__name__ = own.__name__
    return Noting


def step_of_class(damps: bool) -> Callable[[Twin], None]:
    def apply(twin: Twin) -> None:
        own = noted(twin, DDIMScheduler, damps)
        twin.pipe.scheduler = own.from_config(twin.pipe.scheduler.config)

    return apply


def step_of_one(twin: Twin) -> None:
    own = twin.pipe.scheduler.step

    def step(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        twin.seen.append(model_output.clone())
        return own(model_output * 0.9, *args, **kwargs)

    twin.pipe.scheduler.step = step


def scales_input(twin: Twin) -> None:
    own = twin.pipe.scheduler.scale_model_input
    twin.pipe.scheduler.scale_model_input = lambda sample, *rest: own(sample, *rest) * 0.9


def patched_step(name: str, change: Callable[[Any], Any]) -> Edit:
    return Edit(
        "scheduler",
        f"DDIM's {name} patched",
        everywhere=lambda dice: mock.patch.object(
            DDIMScheduler, name, change(getattr(DDIMScheduler, name))
        ),
    )


def damped_step(own: Any) -> Any:
    return lambda self, output, *rest, **more: own(self, output * 0.9, *rest, **more)


add(Edit("scheduler", "a subclass that records", step_of_class(damps=False)))
add(Edit("scheduler", "a subclass that damps", step_of_class(damps=True)))
add(Edit("scheduler", "a replaced step", step_of_one))
add(Edit("scheduler", "a replaced scale_model_input", scales_input))
add(patched_step("step", damped_step))
add(patched_step("scale_model_input", around))
add(patched_step("_get_variance", around))


# Processors


class Own:
    """A user's attention processor."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return AttnProcessor2_0()(attn, hidden_states * 0.9, *args, **kwargs)


class Same(AttnProcessor2_0):
    """A user's subclass of diffusers' processor that computes the same."""


def of_one(make: Callable[[], Any]) -> Callable[[Twin], None]:
    def apply(twin: Twin) -> None:
        twin.dice.choice(of_class(twin.pipe, Attention)).set_processor(make())

    return apply


def chunked(pipe: Any) -> None:
    for block in pipe.unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.set_chunk_feed_forward(2, 1)


def tiles(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size = 4
    pipe.vae.tile_sample_min_size = 8


for _name, _make in {
    "a user's on one attention": Own,
    "AttnProcessor on one attention": AttnProcessor,
    "AttnProcessor2_0 on one attention": AttnProcessor2_0,
    "sliced on one attention": lambda: SlicedAttnProcessor(1),
    "a subclass on one attention": Same,
    "a function on one attention": lambda: lambda attn, x, *rest, **more: x * 0.5,
}.items():
    add(Edit("processor", _name, of_one(_make)))
edits(
    "processor",
    {
        "AttnProcessor": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
        "AttnProcessor2_0": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
        "a user's on all": lambda pipe: pipe.unet.set_attn_processor(Own()),
        "the default": lambda pipe: pipe.unet.set_default_attn_processor(),
        "VAE's default": lambda pipe: pipe.vae.set_default_attn_processor(),
        "VAE's AttnProcessor": lambda pipe: pipe.vae.set_attn_processor(AttnProcessor()),
        "sliced": lambda pipe: pipe.enable_attention_slicing(1),
        "not sliced": lambda pipe: pipe.disable_attention_slicing(),
        "fused": lambda pipe: pipe.unet.fuse_qkv_projections(),
        "fused and unfused": lambda pipe: (
            pipe.unet.fuse_qkv_projections(),
            pipe.unet.unfuse_qkv_projections(),
        ),
        "VAE fused": lambda pipe: pipe.vae.fuse_qkv_projections(),
        "chunked feed forward": chunked,
        "FreeU": lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
        "FreeU off": lambda pipe: pipe.disable_freeu(),
        "FreeU on and off": lambda pipe: (
            pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
            pipe.disable_freeu(),
        ),
        "VAE sliced": lambda pipe: pipe.vae.enable_slicing(),
        "VAE tiled": tiles,
        "VAE neither sliced nor tiled": lambda pipe: (
            pipe.vae.disable_slicing(),
            pipe.vae.disable_tiling(),
        ),
    },
)
