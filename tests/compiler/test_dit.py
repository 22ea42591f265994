"""DiT's pipeline, compiled against eager."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from exact import exact
from small import DIT, noisy

import fastdiff
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.kernels.contract import judge

SCHEDULERS = {
    "DDIM": lambda: DDIMScheduler(clip_sample=False),
    "DDPM, with noise for both halves": lambda: DDPMScheduler(clip_sample=False),
    "DPM++": DPMSolverMultistepScheduler,
}
VAE = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def pipeline(scheduler, **config):
    transformer = noisy(DiTTransformer2DModel(**DIT | config))
    pipe = DiTPipeline(transformer, noisy(AutoencoderKL(**VAE)), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, labels=(207, 3), scale=4.0):
    torch.manual_seed(5)  # its scheduler's noise does not come from the call's generator
    generator = torch.Generator().manual_seed(3)
    options = {"guidance_scale": scale, "num_inference_steps": 5, "output_type": "np"}
    return torch.from_numpy(pipe(list(labels), generator=generator, **options).images)


@pytest.mark.parametrize("scale", [4.0, 1.0, 0.5])  # at most 1: without guidance
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_picture_report_and_restore(scheduler, scale):
    pipe = pipeline(SCHEDULERS[scheduler]())
    eager, truth = drawn(pipe, scale=scale), exact(pipe, drawn, scale=scale)
    fastdiff.compile(pipe)
    ours = drawn(pipe, scale=scale)
    assert (loop_of(pipe).planned, dict(loop_of(pipe).own)) == (1, {})
    assert (slot_of(pipe.transformer).fast, dict(slot_of(pipe.transformer).eager)) == (5, {})
    verdict = judge("picture", ours, eager, truth)
    assert verdict.passed, verdict
    assert "transformer          fastdiff" in str(fastdiff.report(pipe))
    fastdiff.restore(pipe)
    assert torch.equal(drawn(pipe, scale=scale), eager)


def test_a_transformer_without_a_variance():
    pipe = pipeline(DDIMScheduler(clip_sample=False), out_channels=4)
    eager, truth = drawn(pipe, (7,)), exact(pipe, drawn, labels=(7,))
    verdict = judge("picture", drawn(fastdiff.compile(pipe), (7,)), eager, truth)
    assert verdict.passed, verdict
    assert loop_of(pipe).planned == 1


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        (EulerDiscreteScheduler, "its scheduler steps the scaled latents"),
        (lambda: DDPMScheduler(variance_type="learned_range"), "a variance that the loop drops"),
    ],
)
def test_loops_that_stay_diffusers(scheduler, why):
    """diffusers' loop draws the same picture, or raises the same error, as without fastdiff."""
    pipe = pipeline(scheduler())

    def result():
        try:
            return drawn(pipe)
        except TypeError as error:
            return str(error)

    eager = result()
    fastdiff.compile(pipe)
    ours = result()
    assert type(ours) is type(eager)
    if isinstance(eager, str):
        assert ours == eager
    else:
        torch.testing.assert_close(ours, eager, atol=1e-5, rtol=0)
    assert any(why in reason for reason in loop_of(pipe).own), loop_of(pipe).own


def test_other_labels_replay_the_same_step():
    pipe = fastdiff.compile(pipeline(DDIMScheduler(clip_sample=False)))
    eager = pipeline(DDIMScheduler(clip_sample=False))
    for labels in ((1, 2), (999, 0), (1, 2)):
        torch.testing.assert_close(drawn(pipe, labels), drawn(eager, labels), atol=1e-5, rtol=0)
