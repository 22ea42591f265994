"""FLUX.2's pipelines on the plan, each against diffusers."""

import copy

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from peft import LoraConfig
from small import FLUX2, SMALL_VAE, noisy

import fastdiff
from fastdiff.compiler.pipelines import loop_of

STEP = 5e-6
"""Relative error: diffusers computes the rotary embedding and the scheduler in float32."""
VAE = SMALL_VAE | {"latent_channels": 4}


def pipeline(cls, **more):
    told = cls is Flux2Pipeline
    net = noisy(Flux2Transformer2DModel(**FLUX2, guidance_embeds=told)).double()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = noisy(AutoencoderKLFlux2(**VAE)).double()
    return cls(scheduler, vae, None, None, net, **more)


def embeds(seed, count=1):
    return torch.randn(count, 7, 24, generator=torch.Generator().manual_seed(seed)).double()


def call(count=1, **more):
    told = {"prompt_embeds": embeds(1, count), "height": 16, "width": 12, "output_type": "np"}
    return told | more


def picture():
    colours = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return PIL.Image.fromarray(colours)


def test_with_a_distilled_guidance(hold):
    pipe = pipeline(Flux2Pipeline)
    hold(pipe, "plan", STEP, **call())
    hold(pipe, "plan", STEP, **call(image=[picture()], guidance_scale=2.5))


@pytest.mark.parametrize("count", [1, 2])
def test_klein(hold, count):
    """The base model uses guidance, the distilled one does not."""
    pipe, negative = pipeline(Flux2KleinPipeline), {"negative_prompt_embeds": embeds(2, count)}
    hold(pipe, "plan", STEP, **call(count), **negative)
    hold(pipe, "plan", STEP, **call(count, image=picture()), **negative)
    hold(pipeline(Flux2KleinPipeline, is_distilled=True), "plan", STEP, **call(count))


def test_lora_and_restore():
    pipe = pipeline(Flux2KleinPipeline, is_distilled=True).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    targets = ["to_qkv_mlp_proj", "linear_in", "to_add_out", "double_stream_modulation_img.linear"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    pipe.transformer.add_adapter(config, "one")
    eager, drawn = copy.deepcopy(pipe), []
    fastdiff.compile(pipe)
    for scale in (1.0, 0.3):
        given = call(attention_kwargs={"scale": scale}, num_inference_steps=3)
        given["prompt_embeds"] = given["prompt_embeds"].float()
        for which in (eager, pipe):
            generator = torch.Generator().manual_seed(5)
            drawn.append(torch.from_numpy(which(**given, generator=generator).images))
        torch.testing.assert_close(drawn[-1], drawn[-2], rtol=2e-3, atol=2e-3)
    assert (drawn[0] - drawn[2]).abs().max() > 1e-3
    assert loop_of(pipe).planned == 2, loop_of(pipe)
    state = {name: value.clone() for name, value in eager.transformer.state_dict().items()}
    fastdiff.restore(pipe)
    found = pipe.transformer.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())
