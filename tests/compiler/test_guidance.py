"""Guidance with a third prediction (perturbed attention, skipped layers), in float64 against
diffusers."""

import numpy as np
import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    StableDiffusion3PAGImg2ImgPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPAGPipeline,
    StableDiffusionPAGImg2ImgPipeline,
    StableDiffusionPAGInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLPAGInpaintPipeline,
    StableDiffusionXLPAGPipeline,
)
from small import add_ip_adapter_sd3

import fastdiff
from fastdiff.compiler.slot import slot_of

STEP = 2e-6
"""Relative error if the scheduler computes in float32."""


@pytest.fixture
def pag(components):
    """pag(pipeline): a pipeline whose middle block's attention is perturbed."""
    parts = components(), {"requires_safety_checker": False, "pag_applied_layers": ["mid"]}

    def make(pipeline=StableDiffusionPAGPipeline, **more):
        if "XL" in pipeline.__name__:
            options = {"pag_applied_layers": ["mid"], "add_watermarker": False}
            return pipeline(**components(xl=True), **options, **more)
        return pipeline(**parts[0], **parts[1], **more)

    return make


@pytest.mark.parametrize(
    ("pipeline", "guidance_scale"),
    [
        (StableDiffusionPAGPipeline, 4.0),
        (StableDiffusionPAGPipeline, 1.0),
        (StableDiffusionXLPAGPipeline, 4.0),
    ],
)
def test_perturbed_attention(pag, hold, pipeline, guidance_scale):
    pipe = pag(pipeline)
    call = {"guidance_scale": guidance_scale, "num_inference_steps": 3}
    first = hold(pipe, "plan", **call, pag_scale=2.0)
    loan = slot_of(pipe.unet).loan
    assert not np.allclose(first, hold(pipe, "plan", **call, pag_scale=0.0))
    hold(pipe, "plan", STEP, **call, pag_scale=2.0, pag_adaptive_scale=0.003)
    rescaled = {"guidance_rescale": 0.7, "prompt": ["red heart", "blue star"]}
    hold(pipe, "plan", **call | rescaled)
    assert slot_of(pipe.unet).loan is loan  # setting processors moves no weights
    fastdiff.restore(pipe)
    assert type(pipe) is pipeline


@pytest.mark.parametrize("where", ["down_blocks.0", ["mid", "up_blocks.1.attentions.1"]])
def test_the_perturbed_layers_may_change(pag, hold, where):
    pipe = pag()
    first = hold(pipe, "plan")
    pipe.set_pag_applied_layers(where)
    assert not np.allclose(first, hold(pipe, "plan"))


def test_pipelines_that_start_from_a_picture(pag, hold, picture, mask):
    given = {"image": picture(), "strength": 0.6, "num_inference_steps": 4}
    hold(pag(StableDiffusionPAGImg2ImgPipeline), "plan", **given)
    masked = given | {"mask_image": mask}
    for guidance_scale, pag_scale in ((4.0, 2.0), (1.0, 2.0), (1.0, 0.0)):
        scales = {"guidance_scale": guidance_scale, "pag_scale": pag_scale}
        hold(pag(StableDiffusionPAGInpaintPipeline), "plan", **masked, **scales)
    hold(pag(StableDiffusionXLPAGInpaintPipeline), "plan", **masked)
    pipe = fastdiff.compile(pag(StableDiffusionPAGInpaintPipeline))
    with pytest.raises(UnboundLocalError):  # as in diffusers
        pipe("red heart", **masked, guidance_rescale=0.7)


def test_perturbed_attention_with_a_controlnet(components, hold, controlnet, picture):
    parts = components()
    pipe = StableDiffusionControlNetPAGPipeline(
        **parts, controlnet=controlnet(parts["unet"]), requires_safety_checker=False
    )
    hold(pipe, "diffusers", image=picture())


def test_an_ip_adapter_with_perturbed_attention_off(components_sd3, hold):
    pipe = StableDiffusion3PAGPipeline(**components_sd3("sd3"), pag_applied_layers="blocks.1")
    add_ip_adapter_sd3(pipe.transformer)
    embeds = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0)).double()
    calls = [{"ip_adapter_image_embeds": embeds * factor} for factor in (1, 3)]
    first, other = (
        hold(pipe, "plan", STEP, pag_scale=0.0, joint_attention_kwargs=kwargs) for kwargs in calls
    )
    assert not np.allclose(first, other)


@pytest.mark.parametrize("kind", ["sd3", "sd35-large"])
def test_perturbed_attention_of_sd3(components_sd3, hold, picture, kind):
    parts = components_sd3(kind)
    pipe = StableDiffusion3PAGPipeline(**parts, pag_applied_layers="blocks.1")
    for guidance_scale in (4.0, 1.0):
        scales = {"guidance_scale": guidance_scale, "pag_scale": 2.3}
        first = hold(pipe, "plan", STEP, **scales)
    assert not np.allclose(first, hold(pipe, "plan", STEP, guidance_scale=1.0, pag_scale=0.0))
    fastdiff.restore(pipe)
    pipe = StableDiffusion3PAGImg2ImgPipeline(**parts, pag_applied_layers="blocks.1")
    hold(pipe, "plan", STEP, image=picture(), strength=0.6, num_inference_steps=5)


class Following:
    """A callback that stores and scales the latents, and in the second step changes attributes."""

    def __init__(self, **changes):
        self.changes, self.seen = changes, []

    def __call__(self, pipe, i, t, given):
        self.seen.append(given["latents"].clone())
        if i == 1:
            vars(pipe).update(self.changes)
        return {"latents": given["latents"] * 0.9}

    def __deepcopy__(self, memo):
        return self


def test_a_callback_changes_the_scale(pag, hold):
    pipe = pag()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    following = Following(_pag_scale=0.5, _guidance_scale=2.0)
    hold(pipe, "plan", STEP, callback_on_step_end=following)
    eager, ours = following.seen[:4], following.seen[4:]
    torch.testing.assert_close(ours, eager, rtol=STEP, atol=STEP)


def test_a_callback_removes_the_perturbed_processors(pag, hold):
    """diffusers' loop finishes the picture as in eager."""
    pipe, plain = pag(), None

    def change(pipe, i, t, given):
        if i == 1:
            pipe.unet.set_attn_processor(dict(plain))
        return {}

    plain = pipe.unet.attn_processors
    hold(pipe, "returned other embedding shapes", callback_on_step_end=change)


# Skipped layers


SKIPS = {
    "skip_guidance_layers": [1],
    "skip_layer_guidance_start": 0.2,
    "skip_layer_guidance_stop": 0.7,
    "num_inference_steps": 5,
}


def test_skipped_layers(components_sd3, hold):
    pipe = StableDiffusion3Pipeline(**components_sd3("sd35-medium"))
    plain = hold(pipe, "plan", STEP, num_inference_steps=5)
    for layers in ([1], [0, 2]):
        call = SKIPS | {"skip_guidance_layers": layers}
        assert not np.allclose(plain, hold(pipe, "plan", STEP, **call))
    whole = SKIPS | {"skip_layer_guidance_start": -1, "skip_layer_guidance_stop": 2}
    hold(pipe, "plan", STEP, **whole, skip_layer_guidance_scale=5.0)
    never = SKIPS | {"skip_layer_guidance_stop": 0.2}
    np.testing.assert_allclose(hold(pipe, "plan", STEP, **never), plain)
    np.testing.assert_allclose(
        hold(pipe, "plan", STEP, **SKIPS, guidance_scale=1.0),
        hold(pipe, "plan", STEP, num_inference_steps=5, guidance_scale=1.0),
    )


@pytest.mark.parametrize(
    ("at", "loop"), [(0, "plan"), (1, "plan"), (2, "other embedding"), (3, "plan")]
)
def test_a_callback_between_steps_that_skip_layers(components_sd3, hold, at, loop):
    """In diffusers the returned text reaches the first two predictions only; a recorded step with
    skipped layers has one text for all three."""
    pipe = StableDiffusion3Pipeline(**components_sd3())

    def change(pipe, i, t, given):
        if i != at:
            return {}
        pipe._skip_layer_guidance_scale = 1.5
        text = torch.randn(2, 77 + 256, 72, generator=torch.Generator().manual_seed(1))
        text[:, 77:] = 0  # as without T5
        return {"prompt_embeds": text.double(), "latents": given["latents"] * 0.9}

    hold(pipe, loop, STEP, **SKIPS, callback_on_step_end=change)
