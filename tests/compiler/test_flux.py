"""FLUX's pipelines against diffusers, on the plan or in diffusers' own loop around the compiled
network."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxControlInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from flux_calls import SIZE, draw
from small import FLUX

import fastdiff
from fastdiff.compiler.pipelines import loop_of
from fastdiff.runtime.recordings import made

STEP = 5e-6
"""Relative error: diffusers computes the rotary embedding and the scheduler in float32."""


@pytest.fixture
def flux(components_flux):
    return FluxPipeline(**components_flux())


# Texts


@pytest.mark.parametrize(
    "call",
    [
        {"output_type": "np", "guidance_scale": 3.5},
        {"prompt": ["red", "blue"], "num_images_per_prompt": 2, "sigmas": [1.0, 0.6, 0.3]},
        {"true_cfg_scale": 3.0, "negative_prompt": "blue", "num_images_per_prompt": 2},
        {"true_cfg_scale": 3.0, "height": 20},
    ],
    ids=["picture", "several", "true guidance", "no negative prompt"],
)
def test_text_to_image(flux, hold, call):
    hold(flux, "plan", STEP, **SIZE | call)


def test_another_guidance_replays_the_same_step(components_flux, hold):
    pipe = FluxPipeline(**components_flux())
    first = hold(pipe, "plan", STEP, **SIZE)
    before = made()
    assert not np.allclose(first, hold(pipe, "plan", STEP, **SIZE, guidance_scale=1.5))
    assert made() == before


def test_schnell(components_flux, hold):
    """FLUX.1-schnell takes no guidance, and the picture's size does not shift its timesteps."""
    parts = components_flux(guidance_embeds=False)
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=1.0)
    hold(FluxPipeline(**parts), "plan", STEP, **SIZE)


def test_half_precision(components_flux):
    """Timesteps are rounded before the embedding, as in diffusers."""
    pipe = FluxPipeline(**components_flux(torch.bfloat16))
    eager = draw(pipe).float()
    exact = draw(copy.deepcopy(pipe).to(torch.float32))
    ours = draw(fastdiff.compile(pipe)).float()
    assert loop_of(pipe).planned == 1
    assert (ours - eager).norm() < 0.5 * (eager - exact).norm()


# Pictures


@pytest.mark.parametrize(
    "call", [{"strength": 0.6}, {"true_cfg_scale": 2.0, "negative_prompt": "blue"}]
)
def test_image_to_image(components_flux, hold, picture, call):
    pipe = FluxImg2ImgPipeline(**components_flux())
    hold(pipe, "plan", STEP, image=picture(), **SIZE | call)


@pytest.mark.parametrize("true", [1.0, 2.0])
def test_inpainting(components_flux, hold, picture, mask, true):
    pipe = FluxInpaintPipeline(**components_flux())
    call = {"image": picture(), "mask_image": mask, "true_cfg_scale": true, "strength": 0.8}
    call |= {"negative_prompt": "blue", "num_images_per_prompt": 2}
    hold(pipe, "plan", STEP, **SIZE | {"width": 16} | call)


def test_filling(components_flux, hold, picture, mask):
    pipe = FluxFillPipeline(**components_flux(in_channels=48, out_channels=16))
    call = {"image": picture(), "mask_image": mask, "num_images_per_prompt": 2}
    hold(pipe, "plan", STEP, **SIZE | {"width": 16} | call)


def test_a_network_that_takes_no_further_channels_fails_as_diffusers(components_flux, picture):
    pipe = FluxControlPipeline(**components_flux(in_channels=32, out_channels=16))
    pipe.transformer.x_embedder = torch.nn.Linear(16, 24).double()
    pipe.transformer.register_to_config(in_channels=16)
    given, found = {"control_image": torch.randn(1, 12, 16).double(), "height": 16}, []
    for which in (pipe, fastdiff.compile(copy.deepcopy(pipe))):
        with pytest.raises(RuntimeError) as error:
            draw(which, **given)
        found.append(str(error.value))
    assert found[0] == found[1]


def test_a_picture_that_controls(components_flux, hold, picture, mask):
    parts = components_flux(in_channels=32, out_channels=16)
    call = SIZE | {"width": 16, "control_image": picture()}
    hold(FluxControlPipeline(**parts), "plan", STEP, **call)
    pipe = FluxControlInpaintPipeline(**components_flux(in_channels=32, out_channels=16))
    more = {"num_images_per_prompt": 2, "strength": 0.8}
    hold(pipe, "plan", STEP, **call, image=picture(1), mask_image=mask, **more)


def test_kontext(components_flux, hold, picture):
    pipe = FluxKontextPipeline(**components_flux())
    call = SIZE | {"width": 16, "max_area": 256, "_auto_resize": False}
    hold(pipe, "plan", STEP, **call, image=picture())
    true = {"true_cfg_scale": 2.0, "negative_prompt": "blue"}
    hold(pipe, "plan", STEP, **call, image=picture(1), **true)
    hold(pipe, "plan", STEP, **call)


def test_inpainting_by_kontext(components_flux, hold, picture, mask):
    """The reference picture is the inpainted one, or another."""
    pipe = FluxKontextInpaintPipeline(**components_flux())
    call = SIZE | {"width": 16, "max_area": 256, "_auto_resize": False, "strength": 0.8}
    call |= {"image": picture(), "mask_image": mask}
    first = hold(pipe, "plan", STEP, **call, num_images_per_prompt=2)
    true = {"true_cfg_scale": 2.0, "negative_prompt": "blue", "image_reference": picture(1)}
    assert not np.allclose(first[:1], hold(pipe, "plan", STEP, **call, **true))


def test_controlnet(components_flux, hold, picture, shaken):
    config = FLUX | {"num_layers": 1, "num_single_layers": 1}
    pipe = FluxControlNetPipeline(
        **components_flux(), controlnet=shaken(FluxControlNetModel(**config, num_mode=2))
    )
    call = SIZE | {"width": 16, "control_image": picture()}
    first = hold(pipe, "plan", STEP, **call, control_mode=1)
    assert ("controlnet", "fastdiff") in {(p.name, p.runs) for p in fastdiff.report(pipe).parts}
    assert not np.allclose(first, hold(pipe, "plan", STEP, **call, control_mode=0))


# Callbacks


def weights(pipe, x):
    pipe.transformer.single_transformer_blocks[1].proj_out.weight.data.mul_(0.9)


EDITS = {
    "latents": lambda pipe, x: {"latents": x * 0.9},
    "text": lambda pipe, x: {"prompt_embeds": torch.full((1, 9, 20), 0.3).double()},
    "what it does not know": lambda pipe, x: {"control_image": x},
    "weights": weights,
    "sigmas": lambda pipe, x: setattr(pipe.scheduler, "sigmas", pipe.scheduler.sigmas * 0.9),
}
"""The plan follows all but the last."""


@pytest.mark.parametrize("name", EDITS)
def test_what_callbacks_change(flux, name):
    fast, seen = fastdiff.compile(copy.deepcopy(flux)), []
    for pipe in (flux, fast):

        def change(pipe, i, t, kwargs):
            return (EDITS[name](pipe, kwargs["latents"]) or {}) if i == 1 else {}

        seen.append(draw(pipe, callback_on_step_end=change, num_inference_steps=4))
    torch.testing.assert_close(seen[1], seen[0], rtol=STEP, atol=STEP)
    assert loop_of(fast).planned == (name != "sigmas"), loop_of(fast)


def test_a_callback_beside_true_guidance(flux, hold):
    call = {"true_cfg_scale": 3.0, "negative_prompt": "blue"}
    call["callback_on_step_end"] = lambda pipe, i, t, given: {
        "prompt_embeds": torch.full((1, 9, 20), 0.3).double()
    }
    hold(flux, "one half of the network's conditions", STEP, **SIZE | call)


# LoRA


def kohya(up, down):
    """Weights as kohya's scripts name them."""
    widths = {"double_blocks_0_img_attn_qkv": (72, 24), "double_blocks_1_txt_mlp_0": (96, 24)}
    widths["single_blocks_0_linear2"] = 24, 120
    made = {}
    for name, (rows, columns) in widths.items():
        made[f"lora_unet_{name}.lora_down.weight"] = down(columns)
        made[f"lora_unet_{name}.lora_up.weight"] = up(rows)
        made[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    return made


def xlabs(up, down):
    """Weights as XLabs' scripts name them."""
    widths = {"double_blocks.0.processor.qkv_lora1": 72, "double_blocks.1.processor.proj_lora2": 24}
    widths |= {"single_blocks.1.processor.qkv_lora": 72}
    made = {}
    for name, rows in widths.items():
        made |= {f"{name}.down.weight": down(24), f"{name}.up.weight": up(rows)}
    return made


@pytest.mark.parametrize("form", [kohya, xlabs])
def test_a_life_with_lora(components_flux, form):
    eager = FluxPipeline(**components_flux(torch.float32))
    pipe = fastdiff.compile(copy.deepcopy(eager))
    drawn, at = {"none": draw(pipe)}, made()
    weights = form(lambda rows: torch.randn(rows, 4), lambda columns: torch.randn(4, columns))
    steps = {
        "load": lambda pipe: pipe.load_lora_weights(dict(weights), adapter_name="one"),
        "less": lambda pipe: pipe.set_adapters("one", 0.3),
        "off": lambda pipe: pipe.disable_lora(),
        "on": lambda pipe: pipe.enable_lora(),
        "scale": lambda pipe: None,
        "unload": lambda pipe: pipe.unload_lora_weights(),
    }
    for name, change in steps.items():
        for each in (eager, pipe):
            change(each)
        call = {"joint_attention_kwargs": {"scale": 0.5}} if name == "scale" else {}
        want, drawn[name] = draw(eager, **call), draw(pipe, **call)
        torch.testing.assert_close(drawn[name], want, rtol=2e-3, atol=2e-3, msg=name)
        if name in ("less", "off", "on", "scale"):
            assert made() == at, name
        at = made()
    assert (drawn["load"] - drawn["less"]).abs().max() > 0.05
    assert torch.equal(drawn["none"], drawn["off"])
    assert torch.equal(drawn["less"], drawn["on"])
    assert loop_of(pipe).planned == 1 + len(steps)


# Afterwards


def test_restored_and_saved(components_flux, tmp_path):
    pipe = FluxPipeline(**components_flux())
    want, state = draw(pipe), {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    draw(fastdiff.compile(pipe))
    pipe.transformer.save_pretrained(tmp_path)
    found = FluxTransformer2DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    fastdiff.restore(pipe)
    assert type(pipe) is FluxPipeline
    assert torch.equal(draw(pipe), want)
