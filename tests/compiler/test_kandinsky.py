"""Kandinsky 2.2's decoder pipelines, compiled against eager, in float64."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    UNet2DConditionModel,
    VQModel,
)
from small import KANDINSKY22, SIMPLE, noisy

import fastdiff
from fastdiff.compiler.slot import slot_of

UNET = (
    SIMPLE
    | KANDINSKY22
    | {
        "block_out_channels": (16, 32),
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "out_channels": 8,
    }
)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SCHEDULERS = {
    "DDPM": lambda: DDPMScheduler(**BETAS, clip_sample=False, variance_type="fixed_small_log"),
    "its own": lambda: DDPMScheduler(
        **BETAS, thresholding=True, dynamic_thresholding_ratio=0.9, variance_type="learned_range"
    ),
    "DDIM": lambda: DDIMScheduler(**BETAS, clip_sample=False),
}


def movq():
    """A VQ autoencoder whose norms read the latents; a latent is 8×8 pixels."""
    blocks = {
        "block_out_channels": (32, 32, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3),
    }
    return noisy(
        VQModel(**blocks, norm_num_groups=8, norm_type="spatial", latent_channels=4, vq_embed_dim=4)
    )


def made(cls, scheduler="its own", **config):
    unet = noisy(UNet2DConditionModel(**UNET | config)).double()
    pipe = cls(unet=unet, scheduler=SCHEDULERS[scheduler](), movq=movq().double())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(count=1):
    given = torch.randn(2, count, 20, dtype=torch.float64)
    call = {"image_embeds": given[0], "negative_image_embeds": given[1], "prompt": None}
    return call | {"height": 128, "width": 192}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_text_to_image(scheduler, hold):
    pipe = made(KandinskyV22Pipeline, scheduler)
    first = hold(pipe, "plan", **embeddings())
    assert not np.allclose(first, hold(pipe, "plan", **embeddings()))
    hold(pipe, "plan", **embeddings(2), num_images_per_prompt=2, num_inference_steps=3)
    hold(pipe, "plan", **embeddings(2), guidance_scale=1.0)


def test_image_to_image(hold):
    pipe = made(KandinskyV22Img2ImgPipeline)
    picture = torch.rand(1, 3, 128, 192, dtype=torch.float64)
    hold(pipe, "plan", **embeddings(), image=picture, strength=0.6, num_inference_steps=5)
    assert slot_of(pipe.movq.encoder).fast == 1


@pytest.mark.parametrize("scheduler", ["DDPM", "its own"])
def test_inpainting(scheduler, hold):
    """The mask is 1 where the picture is kept; all pictures of a batch keep parts of the first."""
    pipe = made(KandinskyV22InpaintPipeline, scheduler, in_channels=9)
    call = {"image": torch.rand(1, 3, 64, 128), "mask_image": torch.zeros(1, 1, 64, 128)}
    call["mask_image"][..., :64] = 1
    call |= embeddings() | {"height": 64, "width": 128, "num_inference_steps": 2}
    hold(pipe, "plan", **call, num_images_per_prompt=2)
    hold(pipe, "plan", **call, guidance_scale=1.0)


def test_one_picture_for_two_embeddings_is_refused_as_by_diffusers():
    """diffusers does not repeat the masked picture's channels for two embeddings."""
    pipe = fastdiff.compile(made(KandinskyV22InpaintPipeline, in_channels=9))
    call = embeddings(2) | {
        "image": torch.rand(1, 3, 128, 192),
        "mask_image": torch.ones(1, 1, 128, 192),
    }
    del call["prompt"]
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        pipe(**call, num_inference_steps=2)


def test_with_a_callback_diffusers_runs_the_loop(hold):
    pipe = made(KandinskyV22Pipeline)
    quiet = lambda *call: call[-1]  # noqa: E731
    hold(pipe, "callback_on_step_end", **embeddings(), callback_on_step_end=quiet)


@torch.no_grad()
def test_the_decoder_is_reported_as_eager():
    pipe = made(KandinskyV22Pipeline)
    fastdiff.compile(pipe)
    call = {key: value for key, value in embeddings().items() if key != "prompt"}
    with pytest.warns(RuntimeWarning, match="movq.decoder runs eagerly: norms that read the lat"):
        pipe(**call, num_inference_steps=2, output_type="np")
    (part,) = [part for part in fastdiff.report(pipe).parts if part.name == "movq.decoder"]
    assert "norms that read the latents" in part.why
