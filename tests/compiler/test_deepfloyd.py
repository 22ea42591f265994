"""DeepFloyd IF's cascade in float64: pixels, a learned variance, dynamic thresholding, masks."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    IFImg2ImgPipeline,
    IFImg2ImgSuperResolutionPipeline,
    IFInpaintingPipeline,
    IFInpaintingSuperResolutionPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
    UNet2DConditionModel,
)
from small import IF, SIMPLE, noisy

import fastdiff
from fastdiff.compiler.own_size import own_size
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.runtime.planned import kernels_of

THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
LARGE = {"variance_type": "fixed_large", **THRESHOLD}
"""A DDIMScheduler keeps variance_type in its config, where the loop reads it."""
PUBLISHED = {"variance_type": "learned_range", **THRESHOLD}
PARTS = {
    **dict.fromkeys(["tokenizer", "text_encoder", "safety_checker", "feature_extractor"]),
    **{"watermarker": None, "requires_safety_checker": False},
}
SIZE = 8
TOLD = {name: IF[name] for name in ("encoder_hid_dim_type", "encoder_hid_dim")}
"""Without the pooled text, which diffusers computes in float32; the network's tests cover it."""


def unet(enlarges=False):
    levels = {"in_channels": 3, "out_channels": 6, "sample_size": SIZE}
    second = {"in_channels": 6, "class_embed_type": "timestep"} if enlarges else {}
    return noisy(UNet2DConditionModel(**SIMPLE | TOLD | levels | second)).double()


def picture(size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return PIL.Image.fromarray(pixels)


def mask():
    half = np.zeros((SIZE, SIZE), np.uint8)
    half[:, SIZE // 2 :] = 255
    return PIL.Image.fromarray(half)


FIRST = [
    (IFPipeline, {"height": SIZE, "width": SIZE}),
    (IFImg2ImgPipeline, {"image": picture(SIZE), "strength": 0.7}),
    (IFInpaintingPipeline, {"image": picture(SIZE), "mask_image": mask(), "strength": 0.9}),
]
SECOND = [
    (IFSuperResolutionPipeline, {"image": picture(4), "height": SIZE, "width": SIZE}),
    (
        IFImg2ImgSuperResolutionPipeline,
        {"image": picture(4), "original_image": picture(SIZE, 1), "strength": 0.7},
    ),
    (
        IFInpaintingSuperResolutionPipeline,
        {"image": picture(4), "original_image": picture(SIZE, 1), "mask_image": mask()},
    ),
]


def piped(cls, scheduler=None):
    enlarges = "SuperResolution" in cls.__name__
    noising = {"image_noising_scheduler": DDPMScheduler()} if enlarges else {}
    scheduler = scheduler or DDPMScheduler(**PUBLISHED)
    pipe = cls(**PARTS, **noising, unet=unet(enlarges), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, **call):
    texts = torch.Generator().manual_seed(5)
    given = {
        name: torch.randn(1, 5, 24, generator=texts, dtype=torch.float64)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    usual = {"num_inference_steps": 6, "guidance_scale": 4.0, "num_images_per_prompt": 2}
    generator = torch.Generator().manual_seed(3)
    made = pipe(**given, **usual | call, generator=generator, output_type="pt").images
    return made, generator.get_state()


def hold(pipe, **call):
    """Assert that the plan draws diffusers' picture and takes as much noise from the generator."""
    want, spent = drawn(pipe, **call)
    fastdiff.compile(pipe)
    got, ours = drawn(pipe, **call)
    assert float((got - want).abs().max()) <= 1e-9
    assert torch.equal(spent, ours)
    assert (loop_of(pipe).planned, dict(loop_of(pipe).own)) == (1, {})
    assert dict(slot_of(pipe.unet).eager) == {}
    fastdiff.restore(pipe)
    assert torch.equal(drawn(pipe, **call)[0], want)


@pytest.mark.parametrize(("cls", "call"), FIRST + SECOND)
def test_pipelines_with_the_published_scheduler(cls, call):
    hold(piped(cls), **call)


@pytest.mark.parametrize(
    ("scheduler", "call"),
    [
        (DDPMScheduler(variance_type="fixed_small_log"), {}),  # ignores the network's variance
        (DDPMScheduler(variance_type="learned_range"), {"guidance_scale": 1.0}),
        (DDIMScheduler.from_config(DDPMScheduler(**LARGE).config), {"eta": 0.4}),
    ],
)
def test_other_schedulers(scheduler, call):
    hold(piped(IFPipeline, scheduler), height=SIZE, width=SIZE, **call)


def test_a_scheduler_that_ignores_the_learned_variance_fails_as_in_diffusers():
    """DDIM from the published config: diffusers raises, and so does the compiled pipeline."""
    pipe = piped(IFPipeline, DDIMScheduler.from_config(DDPMScheduler(**PUBLISHED).config))
    fastdiff.compile(pipe)
    with pytest.raises(RuntimeError, match="must match"):
        drawn(pipe, height=SIZE, width=SIZE)
    assert [why for why in loop_of(pipe).own if "does not read it" in why]


def test_kernels_are_planned_ahead():
    """The kernels of a step with a learned variance and dynamic thresholding."""
    net = UNet2DConditionModel(**SIMPLE | TOLD | {"in_channels": 3, "out_channels": 6})
    pipe = fastdiff.compile(IFPipeline(**PARTS, unet=noisy(net).half(), scheduler=DDPMScheduler()))
    slot = slot_of(pipe.unet)
    made = kernels_of(slot.kind.planned(slot.network, own_size(pipe)), 90)
    steps = [one for one in made if one.kernel.__name__ == "_guided_step_kernel"]
    assert {one.constants["WIDE"] for one in steps} == {3}
    assert "_limits_kernel" in {one.kernel.__name__ for one in made}


def test_with_a_callback_diffusers_runs_the_loop():
    pipe = piped(IFPipeline)
    fastdiff.compile(pipe)
    seen = []
    drawn(pipe, height=SIZE, width=SIZE, callback=lambda *step: seen.append(step))
    assert len(seen) == 6
    assert loop_of(pipe).planned == 0
