"""Pipelines of Stable Diffusion 3 and 3.5, on the plan or in diffusers' own loop with our networks
inside; each against diffusers itself."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)

import fastdiff
from fastdiff.compiler.pipelines import loop_of

STEP = 5e-6
"""Relative error where the scheduler computes in float32, as RMSNorm always does."""
KINDS = ("sd3", "sd35-medium", "sd35-large")


@pytest.fixture
def sd3(components_sd3):
    return StableDiffusion3Pipeline(**components_sd3())


# Texts


@pytest.mark.parametrize("t5", [False, True], ids=["CLIP", "T5"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_to_image(components_sd3, hold, kind, t5):
    pipe = StableDiffusion3Pipeline(**components_sd3(kind, t5))
    first = hold(pipe, "plan", STEP, output_type="np", negative_prompt="blue")
    assert first.shape == (1, 16, 16, 3)
    assert not np.allclose(first, hold(pipe, "plan", STEP, output_type="np"))
    hold(pipe, "plan", STEP, guidance_scale=1.0, height=20, width=12, max_sequence_length=9)


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 0.0},
        {"guidance_scale": 1.0, "prompt": ["red", "blue"]},
        {"num_images_per_prompt": 3},
        {"prompt": ["red", "blue"], "num_images_per_prompt": 2, "negative_prompt": ["", "green"]},
        {"prompt_2": "dog", "prompt_3": "face", "negative_prompt_2": "blue", "clip_skip": 1},
        {"sigmas": [1.0, 0.6, 0.3]},
    ],
    ids=lambda call: ",".join(call),
)
def test_calls(sd3, hold, call):
    hold(sd3, "plan", STEP, **call)


# Pictures


@pytest.mark.parametrize("call", [{"strength": 0.6}, {"guidance_scale": 1.0, "strength": 1.0}])
def test_image_to_image(components_sd3, hold, picture, call):
    pipe = StableDiffusion3Img2ImgPipeline(**components_sd3("sd35-medium"))
    hold(pipe, "plan", STEP, image=picture(), height=16, width=16, **call)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("channels", [16, 33])
def test_inpainting(components_sd3, hold, picture, mask, channels, guidance):
    pipe = StableDiffusion3InpaintPipeline(**components_sd3(in_channels=channels))
    call = {"image": picture(), "mask_image": mask, "strength": 0.8, "guidance_scale": guidance}
    hold(pipe, "diffusers", STEP, height=16, width=16, **call)


CONTROLLED = ("sd3", "sd35-medium", "sd35-large", "alone")


@pytest.mark.parametrize("kind", CONTROLLED)
def test_controlnet(components_sd3, hold, picture, controlnet_sd3, kind):
    parts = components_sd3("sd3" if kind == "alone" else kind)
    net = controlnet_sd3(kind)
    pipe = StableDiffusion3ControlNetPipeline(**parts, controlnet=net)
    call = {"control_image": picture(1)}
    first = hold(pipe, "diffusers", STEP, **call)
    assert ("controlnet", "fastdiff") in {(p.name, p.runs) for p in fastdiff.report(pipe).parts}
    call |= {"control_guidance_end": 0.5, "controlnet_conditioning_scale": 0.7}
    assert not np.allclose(first, hold(pipe, "diffusers", STEP, **call))
    hold(pipe, "diffusers", STEP, guidance_scale=1.0, num_images_per_prompt=2, **call)
    assert int(calls(pipe, "controlnet").split()[0]) == 12


def test_several_controlnets(components_sd3, hold, picture, controlnet_sd3):
    nets = [controlnet_sd3("sd3", seed) for seed in (1, 2)]
    pipe = StableDiffusion3ControlNetPipeline(**components_sd3(), controlnet=nets)
    images = [picture(1), picture(2)]
    drawn = [
        hold(pipe, "diffusers", STEP, control_image=images, controlnet_conditioning_scale=scales)
        for scales in ([0.5, 1.0], [1.0, 0.5])
    ]
    assert not np.allclose(*drawn)


def test_inpainting_with_a_controlnet(components_sd3, hold, picture, mask, controlnet_sd3):
    net = controlnet_sd3(extra_conditioning_channels=1)
    pipe = StableDiffusion3ControlNetInpaintingPipeline(**components_sd3(), controlnet=net)
    call = {"control_image": picture() * 2 - 1, "control_mask": mask}
    hold(pipe, "diffusers", STEP, height=16, width=16, **call)


def calls(pipe, name):
    (part,) = [part for part in fastdiff.report(pipe).parts if part.name == name]
    return part.why
