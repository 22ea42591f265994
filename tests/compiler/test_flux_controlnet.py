"""FLUX.1's ControlNets in the plan of their transformer, each call against diffusers itself."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
)
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from exact import as_eager
from flux_calls import SIZE, draw
from small import FLUX

import fastdiff
from fastdiff.compiler.own_size import own_size
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.families.flux import DENOISED
from fastdiff.models.flux_control import Control, ControlConditions
from fastdiff.runtime.controlled import Controlled
from fastdiff.runtime.planned import kernels_of, step, without_memory
from fastdiff.runtime.recordings import made

STEP = 5e-6
"""Relative error where heads are turned and the scheduler computes in float32."""
TRUE = {"true_cfg_scale": 3.0, "negative_prompt": "blue"}


@pytest.fixture
def net(shaken):
    """net(seed, dtype, config): a random ControlNet of one block of each kind."""

    def make(seed=7, dtype=torch.float64, **config):
        own = FLUX | {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True} | config
        return shaken(FluxControlNetModel(**own), seed).to(dtype)

    return make


@pytest.fixture
def control(picture):
    """A control picture of three tokens in four."""
    return picture()[..., :12]


@pytest.fixture
def flux(components_flux, net):
    return FluxControlNetPipeline(**components_flux(), controlnet=net())


def fast(pipe):
    """The steps that the transformer ran, and the ControlNet."""
    return slot_of(pipe.transformer).fast, slot_of(pipe.controlnet).fast


# Calls


def test_scales_and_steps_take_no_new_recording(flux, hold, control):
    call = SIZE | {"control_image": control}
    drawn = [hold(flux, "plan", STEP, **call)]
    before = made()
    for scale in (0.3, 0.7):
        drawn.append(hold(flux, "plan", STEP, **call, controlnet_conditioning_scale=scale))
    assert made() == before
    assert fast(flux) == (12, 12)
    some = {"control_guidance_start": 0.25, "control_guidance_end": 0.75}
    drawn.append(hold(flux, "plan", STEP, **call, **some))
    assert fast(flux) == (16, 14)  # it computes only what is added
    drawn.append(hold(flux, "plan", STEP, **call, controlnet_conditioning_scale=0.0))
    assert fast(flux) == (20, 14)
    before = made()
    hold(flux, "plan", STEP, **call, control_guidance_end=0.5)
    assert made() == before
    assert all(not np.allclose(a, b) for a in drawn for b in drawn if a is not b)


@pytest.mark.parametrize("true", [{}, TRUE], ids=["one text", "true guidance"])
def test_a_union(components_flux, net, hold, control, true):
    """Which is told what its picture is, and no guidance."""
    union = net(num_mode=2, guidance_embeds=False)
    pipe = FluxControlNetPipeline(**components_flux(), controlnet=union)
    call = SIZE | true | {"control_image": control, "prompt": ["red", "blue"]}
    call |= {"num_images_per_prompt": 1 if true else 2}
    call |= {"negative_prompt": ["blue", "sun"]} if true else {}
    first = hold(pipe, "plan", STEP, **call, control_mode=1)
    assert not np.allclose(first, hold(pipe, "plan", STEP, **call, control_mode=0))


def test_several_networks(components_flux, net, hold, picture):
    """Those that give fewer residuals say how many are added, and the first whether any are of the
    other blocks; of a network that is alone, every picture is of a mode of its own."""
    nets = [net(), net(1, num_layers=2, num_single_layers=0), net(2, num_single_layers=2)]
    parts, call = components_flux(), SIZE | {"width": 16, "prompt": ["red", "blue"]}
    images = [picture(i) for i in range(3)]
    for order in ((0, 1, 2), (1, 0)):
        several = FluxMultiControlNetModel([nets[i] for i in order])
        pipe = FluxControlNetPipeline(**parts, controlnet=several)
        scales = {"controlnet_conditioning_scale": [0.6, 1.2, 0.4][: len(order)]}
        given = call | {"control_image": images[: len(order)]} | scales
        hold(pipe, "plan", STEP, **given, control_guidance_end=[1.0, 0.5, 0.25][: len(order)])
        fastdiff.restore(pipe)
    union = FluxMultiControlNetModel([net(num_mode=3)])
    pipe = FluxControlNetPipeline(**parts, controlnet=union)
    call |= {"control_image": images, "control_mode": [2, 0, 1], **TRUE}
    call |= {"negative_prompt": ["sun", "sun"], "controlnet_conditioning_scale": [0.6, 1.2, 0.4]}
    hold(pipe, "plan", STEP, **call, control_guidance_start=[0.0, 0.0, 0.5])


def test_pixels_that_the_network_itself_reads(components_flux, net, hold, control, shaken):
    """XLabs' ControlNets, whose residuals the blocks take in turn."""
    own = net(in_channels=16, patch_size=2, conditioning_embedding_channels=4, num_single_layers=0)
    own.input_hint_block = shaken(ControlNetConditioningEmbedding(4, block_out_channels=(8, 8)))
    pipe = FluxControlNetPipeline(**components_flux(num_layers=3), controlnet=own)
    first = hold(pipe, "plan", STEP, **SIZE, control_image=control)
    assert not np.allclose(first, hold(pipe, "plan", STEP, **SIZE, control_image=1 - control))


def test_pictures(components_flux, net, hold, control, picture, mask):
    parts, call = components_flux(), SIZE | {"control_image": control, "strength": 0.8}
    pipe = FluxControlNetImg2ImgPipeline(**parts, controlnet=net())
    hold(pipe, "plan", STEP, **call, image=picture(1), control_guidance_start=0.4)
    fastdiff.restore(pipe)
    pipe = FluxControlNetInpaintPipeline(**parts, controlnet=net())
    call |= {"width": 16, "control_image": picture(), "image": picture(1), "mask_image": mask}
    hold(pipe, "plan", STEP, **call, num_images_per_prompt=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_and_a_restored_pipeline(components_flux, net, control, dtype):
    pipe = FluxControlNetPipeline(**components_flux(dtype), controlnet=net(dtype=dtype))
    call = {"control_image": control.to(dtype), "controlnet_conditioning_scale": 0.7}
    if dtype == torch.float32:
        as_eager(pipe, draw, **call)
        return
    eager, exact = draw(pipe, **call).float(), copy.deepcopy(pipe).to(torch.float32)
    exact = draw(exact, **call | {"control_image": call["control_image"].float()})
    ours = draw(fastdiff.compile(pipe), **call).float()
    assert loop_of(pipe).planned == 1
    assert (ours - eager).norm() < 0.5 * (eager - exact).norm()


def test_float16_that_overflows_is_computed_in_float32(components_flux, net, control):
    """In a ControlNet: then the transformer is, too."""
    pipe = FluxControlNetPipeline(**components_flux(torch.float32), controlnet=net())
    pipe.controlnet.to(torch.float32)
    with torch.no_grad():
        pipe.controlnet.controlnet_blocks[0].weight.mul_(1e5)
    pipe.to(torch.float16)
    call = {"control_image": control.half(), "controlnet_conditioning_scale": 1e-5}
    exact = copy.deepcopy(pipe).to(torch.float32)
    want = draw(exact, **call | {"control_image": call["control_image"].float()})
    fastdiff.compile(pipe)
    for _ in range(2):
        got = draw(pipe, **call)
        assert got.dtype == torch.float16
        torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)
    assert "overflowed in controlnet.controlnet_blocks.0" in str(fastdiff.report(pipe))
    assert loop_of(pipe).planned == 2


# Changes


def scaled(pipe):
    pipe.controlnet.controlnet_blocks[0].weight.data.mul_(0.5)


EDITS = {
    "latents": lambda pipe, x: {"latents": x * 0.9},
    "text": lambda pipe, x: {"prompt_embeds": torch.full((1, 9, 20), 0.3).double()},
    "control picture": lambda pipe, x: {"control_image": x * 0.3},
    "weights": lambda pipe, x: scaled(pipe),
    "network": lambda pipe, x: setattr(pipe, "controlnet", copy.deepcopy(pipe.controlnet)),
}
LEFT = {"control picture": "returned control_image", "network": "replaced the controlnet"}
"""Those after which diffusers' loop goes on."""


@pytest.mark.parametrize("name", EDITS)
def test_what_callbacks_change(flux, control, name):
    compiled, seen = fastdiff.compile(copy.deepcopy(flux)), []
    for pipe in (flux, compiled):

        def change(pipe, i, t, kwargs):
            return (EDITS[name](pipe, kwargs["latents"]) or {}) if i == 1 else {}

        call = {"control_image": control, "num_inference_steps": 4, "control_guidance_end": 0.8}
        seen.append(draw(pipe, callback_on_step_end=change, **call))
    torch.testing.assert_close(seen[1], seen[0], rtol=STEP, atol=STEP)
    loop = loop_of(compiled)
    assert loop.planned == (name not in LEFT), loop.own
    assert all(LEFT[name] in reason for reason in loop.own)


def test_a_callback_that_replaces_one_of_several_pictures(components_flux, net, picture):
    several = FluxMultiControlNetModel([net(), net(1)])
    pipe = FluxControlNetPipeline(**components_flux(), controlnet=several)
    compiled, seen = fastdiff.compile(copy.deepcopy(pipe)), []
    call = {"control_image": [picture(), picture(1)], "width": 16}
    call |= {"controlnet_conditioning_scale": [0.5, 0.8], "num_inference_steps": 4}
    for each in (pipe, compiled):

        def change(pipe, i, t, kwargs):
            x = kwargs["latents"]
            return {"control_image": [x, 0.3 * x]} if i == 1 else {}

        seen.append(draw(each, callback_on_step_end=change, **call))
    torch.testing.assert_close(seen[1], seen[0], rtol=STEP, atol=STEP)
    with pytest.raises(UserError, match="returned a Tensor as control_image; return a"):
        draw(compiled, callback_on_step_end=lambda *_: {"control_image": picture()}, **call)


def test_lora_on_the_transformer(flux, control):
    eager, compiled = flux, fastdiff.compile(copy.deepcopy(flux))
    weights = {}
    for name in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_v"):
        weights[f"transformer.{name}.lora_A.weight"] = torch.randn(4, 24)
        weights[f"transformer.{name}.lora_B.weight"] = torch.randn(24, 4)
    drawn = [draw(eager, control_image=control)]
    for each in (eager, compiled):
        each.load_lora_weights(dict(weights))
    for scale in (1.0, 0.4):
        call = {"control_image": control, "joint_attention_kwargs": {"scale": scale}}
        drawn.append(draw(eager, **call))
        torch.testing.assert_close(draw(compiled, **call), drawn[-1], rtol=1e-4, atol=1e-4)
    assert loop_of(compiled).planned == 2
    assert all((a - b).abs().max() > 0.01 for a in drawn for b in drawn if a is not b)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda pipe: pipe.controlnet.register_forward_hook(lambda *_: None), "a hook that wraps"),
        (lambda pipe: fastdiff.restore(pipe.controlnet), "the controlnet is not compiled"),
    ],
)
def test_what_only_diffusers_loop_runs(flux, control, change, why):
    want = draw(flux, control_image=control)
    change(fastdiff.compile(flux))
    torch.testing.assert_close(draw(flux, control_image=control), want, rtol=STEP, atol=STEP)
    (reason,) = loop_of(flux).own
    assert why in reason


def test_a_controlnet_that_is_gone_is_not_kept(components_flux, net, hold, control):
    """Of two pipelines with one transformer, each finds its recordings again."""
    parts = components_flux()
    first = FluxControlNetPipeline(**parts, controlnet=net())
    hold(first, "plan", STEP, **SIZE, control_image=control)
    second = FluxControlNetPipeline(**parts, controlnet=net(1))
    call = SIZE | {"control_image": control}
    hold(second, "plan", STEP, **call)
    before = made()
    hold(first, "plan", STEP, **call)
    assert made() == before
    kept = weakref.ref(slot_of(first.controlnet).network.network)
    del first
    gc.collect()
    assert kept() is None
    hold(second, "plan", STEP, **call)
    assert made() == before


def test_kernels_are_planned_ahead(components_flux, net):
    """All that a step of both networks launches."""
    half = torch.float16
    pipe = FluxControlNetPipeline(**components_flux(half), controlnet=net(dtype=half))
    fastdiff.compile(pipe)
    sizes, slots = own_size(pipe), [slot_of(pipe.transformer), slot_of(pipe.controlnet)]
    planned = [run for slot in slots for run in slot.kind.planned(slot.network, sizes)]
    own, control = (without_memory(slot.network.network) for slot in slots)
    given, latents = DENOISED.picture(own, sizes.side, 1)
    told = ControlConditions(None, None, None, None, given.guidance, latents, None)
    given = given._replace(controls=(Control(told, (1.0,)),))
    both = Controlled(own, (weakref.ref(control),), (0,), control.counts)
    found = kernels_of(planned, 90)
    assert len(kernels_of([*planned, step(both, given, latents)], 90)) == len(found) > 0
