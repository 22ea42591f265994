"""Pipelines that draw without a text, compiled, beside themselves eager."""

import copy
import inspect

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from small import noisy

import fastdiff
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
PIPES = {
    "ddpm": lambda net: DDPMPipeline(net, DDPMScheduler()),
    "ddim": lambda net: DDIMPipeline(net, DDIMScheduler()),
}


@pytest.fixture(params=PIPES)
def pipe(request):
    made = PIPES[request.param](noisy(UNet2DModel(**NET)))
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipe):
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        return pipe(batch_size=2, generator=generator, num_inference_steps=5, output_type="np")


def exact(pipe, monkeypatch):
    """The picture in float64, from the noise that float32 draws."""
    double = copy.deepcopy(pipe)
    double.unet.double()

    def draw(*shape, dtype, **more):
        return randn_tensor(*shape, dtype=torch.float32, **more).to(dtype)

    with monkeypatch.context() as patch:
        for module in map(inspect.getmodule, (type(pipe), type(pipe.scheduler))):
            patch.setattr(module, "randn_tensor", draw)
        return drawn(double)


def test_the_picture_report_and_restore(pipe, monkeypatch):
    eager, truth = drawn(pipe).images, exact(pipe, monkeypatch).images
    state = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    fastdiff.compile(pipe)
    ours = drawn(pipe).images
    assert (slot_of(pipe.unet).fast, dict(slot_of(pipe.unet).eager)) == (5, {})
    verdict = judge("picture", *map(torch.from_numpy, (ours, eager, truth)))
    assert verdict.passed, verdict
    assert "unet       fastdiff" in str(fastdiff.report(pipe))
    fastdiff.restore(pipe)
    assert (drawn(pipe).images == eager).all()
    assert all(torch.equal(state[name], value) for name, value in pipe.unet.state_dict().items())
