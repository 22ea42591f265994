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
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from small import noisy
from transformers import SiglipVisionConfig, SiglipVisionModel

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


# IP-Adapters

EMBEDS = "ip_adapter_image_embeds"
WIDTH = 20
"""Of an image embedding."""


def with_ip_adapter(pipe, seed=1, scale=1.0):
    """An IP-Adapter of random weights, as diffusers loads it."""
    net = pipe.transformer
    width, head = net.inner_dim, net.config.attention_head_dim
    processors = {
        name: SD3IPAdapterJointAttnProcessor2_0(width, width, head, 32)
        for name in net.attn_processors
    }
    parts = [*processors.values()]
    net.set_attn_processor(processors)  # which empties the dictionary
    net.image_proj = IPAdapterTimeImageProjection(
        WIDTH, width, hidden_dim=32, depth=1, dim_head=8, heads=4, num_queries=5, timestep_in_dim=16
    )
    for i, part in enumerate((net.image_proj, *parts)):
        noisy(part, seed + i).double()
    pipe.set_ip_adapter_scale(scale)
    return pipe


def pictures(seed=0, count=2, tokens=3):
    """Embeddings of pictures [count, tokens, WIDTH]; for guidance the unconditional ones first."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, tokens, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_ip_adapter_and_its_scale(components_sd3, hold, kind):
    pipe = with_ip_adapter(StableDiffusion3Pipeline(**components_sd3(kind)))
    drawn = [hold(pipe, "plan", STEP, **{EMBEDS: pictures()})]
    for scale in (0.5, 0.0, 1.5):
        pipe.set_ip_adapter_scale(scale)
        drawn.append(hold(pipe, "plan", STEP, **{EMBEDS: pictures()}))
    assert all(not np.allclose(a, b) for a in drawn for b in drawn if a is not b)
    pipe.transformer.transformer_blocks[1].attn.processor.scale = 0.0
    hold(pipe, "plan", STEP, **{EMBEDS: pictures()})
    assert np.allclose(hold(pipe, "plan", STEP), drawn[2], atol=1e-4)  # without pictures


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0, EMBEDS: pictures(count=1)},
        {"num_images_per_prompt": 2, EMBEDS: pictures()},
        {"prompt": ["red", "blue"], EMBEDS: pictures()},
    ],
    ids=["no guidance", "two pictures", "two prompts"],
)
def test_ip_adapter_of_batches(sd3, hold, call):
    hold(with_ip_adapter(sd3), "plan", STEP, **call)


def test_ip_adapter_of_a_picture(sd3, hold):
    """Its encoder is diffusers', once a picture."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 2}
    config = SiglipVisionConfig(num_hidden_layers=2, image_size=16, patch_size=8, **sizes)
    sd3.register_modules(image_encoder=noisy(SiglipVisionModel(config)).double())
    with_ip_adapter(sd3)
    picture = torch.rand(1, 3, 16, 16).double()
    first = hold(sd3, "plan", STEP, ip_adapter_image=picture)
    assert not np.allclose(first, hold(sd3, "plan", STEP))
    why = {part.name: (part.runs, part.why) for part in fastdiff.report(sd3).parts}
    assert why["image_encoder"] == ("diffusers", "once per picture")
    assert why["transformer.image_proj"][0] == "diffusers"


def test_pictures_that_come_among_the_attention_kwargs(sd3, hold):
    """diffusers puts those of its own argument there, in the caller's own dictionary."""
    with_ip_adapter(sd3)
    plain, wanted = hold(sd3, "plan", STEP), hold(sd3, "plan", STEP, **{EMBEDS: pictures()})
    kwargs = {"joint_attention_kwargs": {EMBEDS: pictures()}}
    assert np.array_equal(hold(sd3, "plan", STEP, **kwargs), wanted)
    kwargs = {"scale": 1.0}
    call = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent"}
    call |= {"prompt": "red heart", "joint_attention_kwargs": kwargs}
    for given in ({EMBEDS: pictures()}, {}):  # the second time they are still there
        generator = torch.Generator().manual_seed(5)
        got = sd3(**call, **given, generator=generator).images
        assert torch.equal(torch.tensor(wanted), got)
    assert np.array_equal(hold(sd3, "plan", STEP), plain)


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("kind", ["other", "in place", "none", "longer", "scale", "from zero"])
def test_pictures_changed_between_steps(sd3, kind, when):
    def edit(pipe, i, t, kwargs):
        if i == when:
            given = pipe.joint_attention_kwargs
            if kind == "other":
                given[EMBEDS] = torch.cat([pictures(1)[:1], pictures(2)[:1]])
            elif kind == "in place":
                given[EMBEDS].mul_(0.3)
            elif kind == "none":
                del given[EMBEDS]
            elif kind == "longer":
                given[EMBEDS] = pictures(3, tokens=4)
            else:
                pipe.set_ip_adapter_scale(0.6)
        return {}

    with_ip_adapter(sd3, scale=0.0 if kind == "from zero" else 1.0)
    fast = fastdiff.compile(copy.deepcopy(sd3))
    want, got = (draw(p, **{EMBEDS: pictures()}, callback_on_step_end=edit) for p in (sd3, fast))
    torch.testing.assert_close(got, want, rtol=STEP, atol=STEP)
    assert not any("eagerly" in part.why for part in fastdiff.report(fast).parts)
    if kind in ("none", "from zero"):
        assert "of another form" in str(loop_of(fast).own)
    else:
        assert loop_of(fast).planned == 1, loop_of(fast)


def test_ip_adapter_beside_a_controlnet(components_sd3, hold, picture, controlnet_sd3):
    """A ControlNet is given the attention kwargs, too, and reads a LoRA scale alone."""
    parts = components_sd3()
    pipe = StableDiffusion3ControlNetPipeline(**parts, controlnet=controlnet_sd3())
    call = {"control_image": picture(), EMBEDS: pictures()}
    call |= {"joint_attention_kwargs": {"scale": 0.5}}
    hold(with_ip_adapter(pipe), "diffusers", STEP, **call)


def draw(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    given["generator"] = torch.Generator().manual_seed(5)
    if "prompt_embeds" not in options:
        given["prompt"] = "red heart"
    return pipe(**given | options).images
