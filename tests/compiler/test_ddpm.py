"""DDPM and DDIM pipelines without a prompt, compiled against eager."""

import copy
import io

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from small import noisy

import fastdiff
from fastdiff.bench.pixels import noise_as
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.kernels.contract import judge

NET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
THRESHOLD = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
PIPES = {
    "ddpm": lambda net: DDPMPipeline(net, DDPMScheduler()),
    "ddpm, cosine": lambda net: DDPMPipeline(net, DDPMScheduler(beta_schedule="squaredcos_cap_v2")),
    "ddpm, unclipped, cosine": lambda net: DDPMPipeline(
        net, DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    ),
    "ddim": lambda net: DDIMPipeline(net, DDIMScheduler()),
    "ddim, thresholds": lambda net: DDIMPipeline(net, DDIMScheduler(**THRESHOLD)),
    "ddpm, learned variance": lambda net: DDPMPipeline(
        net, DDPMScheduler(variance_type="learned_range")
    ),
}


@pytest.fixture(params=PIPES)
def pipe(request):
    channels = 6 if "learned" in request.param else 3
    made = PIPES[request.param](noisy(UNet2DModel(**NET, out_channels=channels)))
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipe):
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        return pipe(batch_size=2, generator=generator, num_inference_steps=5, output_type="np")


def exact(pipe):
    """The picture in float64, from the same noise as in float32."""
    double = copy.deepcopy(pipe)
    double.unet.double()

    with noise_as(double, torch.float32):
        return drawn(double)


def test_the_picture_report_and_restore(pipe):
    eager, truth = drawn(pipe).images, exact(pipe).images
    state = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    fastdiff.compile(pipe)
    ours = drawn(pipe).images
    assert (slot_of(pipe.unet).fast, dict(slot_of(pipe.unet).eager)) == (5, {})
    assert (loop_of(pipe).planned, dict(loop_of(pipe).own)) == (1, {})
    verdict = judge("picture", *map(torch.from_numpy, (ours, eager, truth)))
    assert verdict.passed, verdict
    assert "unet       fastdiff" in str(fastdiff.report(pipe))
    fastdiff.restore(pipe)
    assert (drawn(pipe).images == eager).all()
    assert all(torch.equal(state[name], value) for name, value in pipe.unet.state_dict().items())


def test_arguments_of_the_step_reach_the_plan():
    """DDIM's eta and use_clipped_model_output, and a generator for each picture."""
    pipe = PIPES["ddim"](noisy(UNet2DModel(**NET)))
    pipe.set_progress_bar_config(disable=True)

    def drawn(**more):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        call = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
        return pipe(generator=generators, **call, **more).images

    pipe.unet.double()  # so that only the loop can differ
    given = ({}, {"eta": 0.7}, {"eta": 1.0, "use_clipped_model_output": True})
    eager = [drawn(**more) for more in given]
    fastdiff.compile(pipe)
    for more, want in zip(given, eager, strict=True):
        # the tolerance of tests/runtime/test_schedulers.py
        assert abs(drawn(**more) - want).max() < 1e-10, more
    assert loop_of(pipe).planned == 3


def test_a_scheduler_that_would_scale_the_input():
    """DDPM's loop never calls scale_model_input, and warns; the plan does not scale either."""
    pipe = PIPES["ddpm"](noisy(UNet2DModel(**NET)).double())
    pipe.scheduler = EulerDiscreteScheduler()
    pipe.set_progress_bar_config(disable=True)
    want = drawn(pipe).images
    fastdiff.compile(pipe)
    assert abs(drawn(pipe).images - want).max() < 2e-6  # the scheduler computes in float32
    assert loop_of(pipe).planned == 1


def test_the_progress_bar_counts_every_step(pipe):
    shown = []
    for compiled in (False, True):
        if compiled:
            fastdiff.compile(pipe)
        # without the rate, which depends on the speed
        counts = "{percentage:.0f}% {n_fmt}/{total_fmt}"
        pipe.set_progress_bar_config(file=(file := io.StringIO()), mininterval=0, bar_format=counts)
        drawn(pipe)
        shown.append(file.getvalue().split("\r")[-1])
    assert shown[0] == shown[1]
    assert "5/5" in shown[1]


def test_a_loop_without_a_plan_stays_diffusers():
    """diffusers' loop around the compiled network draws the same picture."""
    pipe = PIPES["ddpm"](noisy(UNet2DModel(**NET)))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler(thresholding=True)
    eager = drawn(pipe).images
    fastdiff.compile(pipe)
    assert abs(drawn(pipe).images - eager).max() < 1e-3
    assert loop_of(pipe).planned == 0
    assert [why for why in loop_of(pipe).own if "thresholds" in why]


@pytest.mark.parametrize(
    ("channels", "scheduler", "why"),
    [
        (3, DDPMScheduler(variance_type="learned_range"), "that the network does not give"),
        (6, DDPMScheduler(), "the scheduler ignores it"),
        (4, DDPMScheduler(), "4 channels are predicted for 3"),
        (3, UniPCMultistepScheduler(), "its step takes no generator"),
    ],
)
def test_a_scheduler_that_does_not_fit_the_network_raises_as_in_diffusers(channels, scheduler, why):
    pipe = DDPMPipeline(noisy(UNet2DModel(**NET, out_channels=channels)), scheduler)
    pipe.set_progress_bar_config(disable=True)
    fastdiff.compile(pipe)
    with pytest.raises((RuntimeError, TypeError)):
        drawn(pipe)
    assert [reason for reason in loop_of(pipe).own if why in reason]
