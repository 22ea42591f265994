"""Consistency models: class labels, and a scheduler that clips and then adds noise."""

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from small import noisy

import fastdiff
from fastdiff.bench.contenders import sharing
from fastdiff.bench.pixels import noise_as
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.kernels.contract import judge

NET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attn_norm_num_groups": 8,
    "num_class_embeds": 10,
}
CALLS = {
    "one step": {"num_inference_steps": 1},
    "three steps": {"num_inference_steps": 3},
    "published timesteps": {"num_inference_steps": None, "timesteps": [22, 0]},
}


def made(**scheduler):
    pipe = ConsistencyModelPipeline(
        noisy(UNet2DModel(**NET)), CMStochasticIterativeScheduler(**scheduler)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, call, **more):
    generator = torch.Generator().manual_seed(3)
    given = {"batch_size": 2, "class_labels": [7, 2], "generator": generator} | call | more
    return pipe(**given, output_type="pt").images


@pytest.mark.parametrize("clips", [True, False])
def test_pictures_are_within_the_budget(clips):
    pipe = made(clip_denoised=clips)
    exact = sharing(pipe).to(torch.float64)
    eager = [drawn(pipe, call) for call in CALLS.values()]
    with noise_as(exact, torch.float32):
        truth = [drawn(exact, call) for call in CALLS.values()]
    fastdiff.compile(pipe)
    for name, theirs, right in zip(CALLS, eager, truth, strict=True):
        verdict = judge(name, drawn(pipe, CALLS[name]), theirs, right)
        assert verdict.passed, verdict
    assert (slot_of(pipe.unet).fast, dict(slot_of(pipe.unet).eager)) == (6, {})
    assert (loop_of(pipe).planned, dict(loop_of(pipe).own)) == (3, {})


def test_another_class_label_changes_only_its_picture():
    pipe = fastdiff.compile(made())
    call = CALLS["one step"]
    first, second = drawn(pipe, call), drawn(pipe, call, class_labels=[7, 3])
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
