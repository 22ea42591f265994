"""Pipelines other than text-to-image, on the plan or in diffusers' own loop around compiled
networks, each in float64 against diffusers."""

from unittest import mock

import numpy as np
import pytest
import torch
import tqdm
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MultiAdapter,
    PNDMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)

import fastdiff

STEP = 2e-6
"""Relative error if the scheduler computes in float32."""


def test_t2i_adapter(components, hold, picture, shaken):
    adapters = [
        shaken(T2IAdapter(3, (32, 64), 1, downscale_factor=2, adapter_type="full_adapter"), seed)
        for seed in (1, 2)
    ]
    pipe = StableDiffusionAdapterPipeline(
        **components(), adapter=adapters[0], requires_safety_checker=False
    )
    hold(pipe, "diffusers", image=picture(), adapter_conditioning_scale=0.8)
    pipe.adapter = MultiAdapter(adapters)
    hold(pipe, "diffusers", image=[picture(), picture(1)], adapter_conditioning_scale=[0.8, 0.3])


def test_t2i_adapter_of_sdxl(components, hold, picture, shaken):
    """Its residuals come after the first block's resampler, in blocks with attention, and mid."""
    unet = {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    adapter = T2IAdapter(3, (32, 64, 64, 64), 1, downscale_factor=4, adapter_type="full_adapter_xl")
    pipe = StableDiffusionXLAdapterPipeline(**components(True, unet=unet), adapter=shaken(adapter))
    call = {"image": picture(), "adapter_conditioning_factor": 0.5}
    first = hold(pipe, "diffusers", **call)
    assert not np.allclose(first, hold(pipe, "diffusers", **call, adapter_conditioning_scale=0.0))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_residuals_in_deprecated_or_wrong_form_run_eagerly(components):
    """diffusers reads ControlNet's argument alone as a T2I-Adapter's; it pops from the list, so a
    tuple fails."""
    unet = components()["unet"]
    sample, text = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 7, 32).double()
    inner = [torch.randn(2, 32, 8, 8).double(), torch.randn(2, 64, 4, 4).double()]

    def call(**options):
        return unet(sample, 7, text, **options)[0]

    want = call(down_intrablock_additional_residuals=[*inner])
    fastdiff.compile(unet)
    got = call(down_intrablock_additional_residuals=[*inner])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    with pytest.warns(RuntimeWarning, match="only some of"):
        got = call(down_block_additional_residuals=[*inner])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    with pytest.warns(RuntimeWarning, match="a tuple"), pytest.raises(AttributeError, match="pop"):
        call(down_intrablock_additional_residuals=tuple(inner))


# Distilled models, without guidance


def lcm(components):
    parts = components(unet={"time_cond_proj_dim": 16})
    return parts | {"scheduler": LCMScheduler.from_config(parts["scheduler"].config)}


def test_lcm_pipelines(components, hold, picture):
    parts = lcm(components)
    pipe = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    first = hold(pipe, "plan", guidance_scale=8.5)
    assert not np.allclose(first, hold(pipe, "plan", guidance_scale=2.0))
    fastdiff.restore(pipe)
    pipe = LatentConsistencyModelImg2ImgPipeline(**parts, requires_safety_checker=False)
    hold(pipe, "plan", image=picture(), strength=0.6)


def test_a_plan_in_a_pipeline_whose_loop_is_replaced_at_the_progress_bar(components, hold):
    """Progress bar, callbacks and result are as in diffusers, and restore removes the change."""
    pipe = LatentConsistencyModelPipeline(**lcm(components), requires_safety_checker=False)
    own = type(pipe)
    hold(pipe, "plan")
    with mock.patch.object(tqdm.tqdm, "update", autospec=True) as moved:
        hold(pipe, "plan", num_inference_steps=3)
    assert moved.call_count == 2 * 3  # eager's and the compiled loop's
    seen = []

    def halve(pipe, i, t, given):
        seen.append(i)
        return {"latents": given["latents"] / 2}

    hold(pipe, "resume in mid-loop", callback_on_step_end=halve)
    assert seen == 2 * [0, 1, 2, 3]
    fastdiff.restore(pipe)
    assert type(pipe) is own


# Pipelines that start from a picture, or stop before one


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_img2img(components, hold, scheduler, strength, picture):
    pipe = StableDiffusionImg2ImgPipeline(**components(), requires_safety_checker=False)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    tolerance = 1e-9 if scheduler is DDIMScheduler else STEP
    hold(pipe, "plan", tolerance, image=picture(), strength=strength, num_inference_steps=6)


def test_sdxl_base_and_refiner(components, hold):
    xl = StableDiffusionXLPipeline(**components(xl=True), add_watermarker=False)
    noisy = hold(xl, "plan", denoising_end=0.6, num_inference_steps=6)
    refiner = StableDiffusionXLImg2ImgPipeline(
        **components(
            xl=True,
            unet={"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 5 * 8 + 32},
        )
        | {"text_encoder": None, "tokenizer": None},
        requires_aesthetics_score=True,
        add_watermarker=False,
    )
    call = {"image": torch.from_numpy(noisy), "num_inference_steps": 6}
    hold(refiner, "plan", denoising_start=0.6, aesthetic_score=5.0, **call)
    hold(refiner, "plan", denoising_start=0.3, denoising_end=0.9, **call)


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("is_xl", [False, True], ids=["sd", "sdxl"])
def test_inpaint(components, hold, channels, is_xl, picture, mask):
    parts = components(xl=is_xl, unet={"in_channels": channels})
    if is_xl:
        pipe = StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)
    else:
        pipe = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    call = {"image": picture(), "mask_image": mask, "height": 16, "width": 16}
    first = hold(pipe, "plan", **call, strength=0.8)
    if channels == 4:
        for scheduler in (DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler):
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
            two = {"prompt": ["red heart", "blue star"], "num_images_per_prompt": 2}
            hold(pipe, "plan", STEP, **call | two, strength=1.0, guidance_scale=1.0)
        other = call | {"mask_image": 1 - mask, "num_inference_steps": 2}
        assert not np.allclose(first, hold(pipe, "plan", STEP, **other, strength=0.8))


def test_a_callback_that_returns_a_mask(components, hold, picture, mask):
    pipe = StableDiffusionInpaintPipeline(**components(), requires_safety_checker=False)
    call = {"image": picture(), "mask_image": mask, "height": 16, "width": 16}

    def halve(pipe, i, t, given):
        return {"latents": given["latents"] / 2}

    def move(pipe, i, t, given):
        return {"mask": torch.ones(2, 1, 8, 8).double()} if i == 1 else {}

    hold(pipe, "plan", **call, callback_on_step_end=halve)
    hold(pipe, "returned mask", **call, callback_on_step_end=move)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, HeunDiscreteScheduler])
def test_inpainting_with_schedulers_that_keep_samples(components, hold, picture, mask, scheduler):
    """The plan runs only if the scheduler's table can follow samples changed between steps."""
    pipe = StableDiffusionInpaintPipeline(**components(), requires_safety_checker=False)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    call = {"image": picture(), "mask_image": mask, "height": 16, "width": 16}
    loop = "plan" if scheduler is HeunDiscreteScheduler else "does not follow samples"
    hold(pipe, loop, STEP, **call, num_inference_steps=6)


def test_instruct_pix2pix(components, hold, picture):
    pipe = StableDiffusionInstructPix2PixPipeline(
        **components(unet={"in_channels": 8}), requires_safety_checker=False
    )
    hold(pipe, "diffusers", image=picture(size=32), image_guidance_scale=1.5)
    parts = components(xl=True, unet={"in_channels": 8})
    pipe = StableDiffusionXLInstructPix2PixPipeline(**parts, add_watermarker=False)
    hold(pipe, "diffusers", image=picture(size=32), image_guidance_scale=1.5, height=32, width=32)
