"""What is done to a compiled pipeline between two pictures: right pictures, or diffusers' own."""

import copy
import warnings

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import fastdiff
from fastdiff.bench.presets import build


@pytest.fixture
def pipe(demo):
    return copy.deepcopy(demo)


def draw(pipe, **options):
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"} | options
    return pipe("red heart", generator=torch.Generator().manual_seed(5), **options).images


def psnr(a, b):
    return -10 * np.log10(max(np.mean((a - b) ** 2), 1e-20))


def the_unet(pipe):
    return next(part for part in fastdiff.report(pipe).parts if part.name == "unet")


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return (output[0] * 1.1,) if isinstance(output, tuple) else output


def hooked(pipe):
    add_hook_to_module(pipe.unet, Doubling())


def offloaded(pipe):
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))


def offloaded_in_groups(pipe):
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )


@pytest.mark.parametrize("change", [hooked, offloaded, offloaded_in_groups])
def test_offloading_hooks_run_eagerly_until_they_are_gone(pipe, change):
    plain = copy.deepcopy(pipe)
    fastdiff.compile(pipe)
    before = draw(pipe)
    change(plain)
    change(pipe)
    want = draw(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert psnr(draw(pipe), want) >= 60
    assert the_unet(pipe).runs == "eager"
    assert "hook" in the_unet(pipe).why
    if change is hooked:
        remove_hook_from_module(pipe.unet)
        assert psnr(draw(pipe), before) >= 60
        assert the_unet(pipe).runs == "fastdiff"


def test_a_vae_that_is_upcast_for_every_picture():
    """SDXL's own VAE overflows in float16: diffusers casts it up and down around each decode."""
    pipe = build("sdxl", 0.13, torch.float16, "cpu")
    pipe.vae.register_to_config(force_upcast=True)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2}
    want = draw(pipe, **options)
    fastdiff.compile(pipe)
    for _ in range(2):
        assert psnr(draw(pipe, **options), want) >= 40
        assert pipe.vae.dtype == torch.float16
    assert not any("eagerly" in part.why for part in fastdiff.report(pipe).parts)


def test_training_mode_runs_eagerly(pipe):
    want = draw(pipe)
    fastdiff.compile(pipe)
    pipe.unet.train()
    with pytest.warns(RuntimeWarning, match="training"):
        assert psnr(draw(pipe), want) >= 60
    pipe.unet.eval()
    assert psnr(draw(pipe), want) >= 60
    assert the_unet(pipe).runs == "fastdiff"


def test_components_replaced_between_two_pictures(pipe):
    fastdiff.compile(pipe)
    draw(pipe)
    other = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        other.conv_in.weight.mul_(1.1)
    pipe.unet = other  # not compiled: diffusers' own
    plain = copy.deepcopy(pipe)
    assert psnr(draw(pipe), draw(plain)) >= 60
    assert the_unet(pipe).runs == "eager"
    fastdiff.compile(pipe)
    assert psnr(draw(pipe), draw(plain)) >= 60
    assert the_unet(pipe).runs == "fastdiff"


def test_memory_that_runs_out_leaves_no_half_loan(pipe, monkeypatch):
    from fastdiff.models.borrow import Loan

    want = draw(pipe)
    fastdiff.compile(pipe)
    before = draw(pipe)
    place = Loan._place

    def no_memory(self, sources, *shape):
        if not self._rehearsal and len(self._lent) > 40:
            raise MemoryError
        return place(self, sources, *shape)

    pipe.unet.to(torch.float64).to(torch.float32)  # so that the next picture borrows anew
    with monkeypatch.context() as patch:
        patch.setattr(Loan, "_place", no_memory)
        with pytest.raises(MemoryError):
            draw(pipe)
    assert psnr(draw(pipe), want) >= 60
    assert np.array_equal(draw(pipe), before)
