"""FLUX's IP-Adapters on the plan: pictures, scales, true classifier-free guidance and edits."""

import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)
from small import FLUX

import fastdiff
from fastdiff.runtime.recordings import made

STEP = 5e-6
"""Relative error: diffusers computes the rotary embedding and the scheduler in float32."""
WIDTH, TEXT, INNER = 20, 20, 24
"""Widths of an image embedding, the text embedding and the network's hidden states."""


def state_dict(seed):
    """Random weights of an IP-Adapter for two blocks."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator).double() * shape[-1] ** -0.5

    layers = {}
    for name in ("0.to_k_ip", "0.to_v_ip", "1.to_k_ip", "1.to_v_ip"):
        layers |= {f"{name}.weight": randn(INNER, TEXT), f"{name}.bias": randn(INNER)}
    projection = {"proj.weight": randn(4 * TEXT, WIDTH), "proj.bias": randn(4 * TEXT)}
    projection |= {"norm.weight": randn(TEXT) + 1, "norm.bias": randn(TEXT)}
    return {"image_proj": projection, "ip_adapter": layers}


def load(pipe, *seeds):
    files = [state_dict(seed) for seed in seeds]
    names = [""] * len(files)
    pipe.load_ip_adapter(files, names, image_encoder_pretrained_model_name_or_path=None)
    return pipe


def pictures(*seeds, pictures=1, count=1):
    """The call's image embeddings: for each seed one adapter's, [count, pictures, WIDTH]."""
    own, other = (
        [torch.randn(count, pictures, WIDTH, generator=g.manual_seed(s)).double() for s in seeds]
        for g, seeds in ((torch.Generator(), seeds), (torch.Generator(), [s + 50 for s in seeds]))
    )
    return {"ip_adapter_image_embeds": own, "negative_ip_adapter_image_embeds": other}


CALL = {"height": 16, "width": 12, "max_sequence_length": 9}


@pytest.fixture
def flux(components_flux):
    return FluxPipeline(**components_flux())


def test_scales_take_no_new_recording(flux, hold):
    call = CALL | pictures(0)
    drawn = [hold(load(flux, 1), "plan", STEP, **call)]
    before = made()
    for scale in (0.5, [0.0, 1.5]):
        flux.set_ip_adapter_scale(scale)
        drawn.append(hold(flux, "plan", STEP, **call))
    assert made() == before
    assert all(not np.allclose(a, b) for a in drawn for b in drawn if a is not b)


def test_two_adapters_beside_true_guidance(flux, hold):
    load(flux, 1, 2)
    flux.set_ip_adapter_scale([0.7, 0.2])
    true = {"true_cfg_scale": 3.0, "negative_prompt": ["blue", "sun"]}
    two = pictures(0, 1, pictures=2, count=2)
    first = hold(flux, "plan", STEP, prompt=["red", "blue"], **CALL, **true, **two)
    other = two | {"negative_ip_adapter_image_embeds": two["ip_adapter_image_embeds"]}
    second = hold(flux, "plan", STEP, prompt=["red", "blue"], **CALL, **true, **other)
    assert not np.allclose(first, second)


def test_beside_a_controlnet(components_flux, hold, picture, shaken):
    config = FLUX | {"num_layers": 1, "num_single_layers": 1}
    net = shaken(FluxControlNetModel(**config))
    pipe = load(FluxControlNetPipeline(**components_flux(), controlnet=net), 1)
    call = CALL | {"width": 16, "control_image": picture(), "negative_prompt": "blue"}
    hold(pipe, "plan", STEP, **call, **pictures(0), true_cfg_scale=3.0)


def test_beside_a_picture_of_kontext(components_flux, hold):
    pipe = load(FluxKontextPipeline(**components_flux()), 1)
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(1, 3, 16, 16, generator=generator).double()
    more = {"max_area": 256, "_auto_resize": False, "width": 16}
    hold(pipe, "plan", STEP, image=image, **CALL | pictures(0) | more)


def test_a_scale_changed_between_steps(flux, hold):
    call = CALL | pictures(0)
    plain = hold(load(flux, 1), "plan", STEP, **call)

    def fade(pipe, i, t, kwargs):
        pipe.set_ip_adapter_scale(1.0 if i == 3 else 0.5 - 0.25 * i)  # the last step restores it
        return kwargs

    fastdiff.restore(flux)
    faded = hold(flux, "plan", STEP, callback_on_step_end=fade, **call)
    assert not np.allclose(faded, plain)


def test_loaded_edited_and_unloaded_after_compile(flux, hold):
    plain = hold(flux, "plan", STEP, **CALL)
    call = CALL | pictures(0)
    first = hold(load(flux, 1), "plan", STEP, **call)
    with torch.no_grad():
        flux.transformer.transformer_blocks[1].attn.processor.to_v_ip[0].bias *= 3
        flux.transformer.encoder_hid_proj.image_projection_layers[0].norm.weight *= 2
    assert not np.allclose(hold(flux, "plan", STEP, **call), first)
    flux.unload_ip_adapter()
    assert np.allclose(hold(flux, "plan", STEP, **CALL), plain, rtol=1e-9)
    load(flux, 1)
    with pytest.raises(TypeError), pytest.warns(RuntimeWarning, match="ip_adapter_image_embeds"):
        flux("red", **CALL)  # without a picture diffusers itself fails
