"""Recordings and float32 copies made for one scheduler or one state of weights serve no other."""

import copy

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from small import coder

import fastdiff
from fastdiff.compiler.slot import slot_of


def test_a_scheduler_changed_between_pictures(components, hold):
    """Schedulers without a history, with one, and with noise each get their own recording."""
    pipe = StableDiffusionPipeline(**components(), requires_safety_checker=False)
    config = pipe.scheduler.config
    for name in ("DDIM", "DPMSolverMultistep", "EulerAncestralDiscrete", "DDIM"):
        pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
        hold(pipe, "plan", 5e-6)


@torch.no_grad()
def test_an_edit_beyond_the_first_row_discards_the_float32_copy():
    net, decoder, (latents,), _ = coder("decoder")
    weight = decoder.up_blocks[0].resnets[1].conv2.weight
    weight[1:] *= 3e5
    net.half()
    latents = latents.half()
    fastdiff.compile(net)
    decoder(latents)
    assert slot_of(decoder).promotion is not None
    weight[1:] *= 1 / 3e5
    want = copy.deepcopy(net).decoder(latents)
    torch.testing.assert_close(decoder(latents), want, rtol=0.02, atol=0.02)
    assert slot_of(decoder).promotion is None
