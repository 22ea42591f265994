"""Stable Diffusion's upscaler, compiled against eager, in float64."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from diffusers import StableDiffusionUpscalePipeline as Upscale
from peft import LoraConfig

import fastdiff
from fastdiff.models import UNet

BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
UNET = {
    "in_channels": 7,
    "only_cross_attention": (True, False),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "num_class_embeds": 40,
}


@pytest.fixture
def upscale(components):
    """upscale(dtype): a pipeline with one input pixel and 2×2 output pixels per latent."""

    def make(dtype=torch.float64):
        parts = components(unet=UNET, dtype=dtype)
        parts["vae"].register_to_config(scaling_factor=0.08333)
        del parts["safety_checker"], parts["feature_extractor"]
        parts["scheduler"] = DDIMScheduler(
            **BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False
        )
        low = DDPMScheduler(**BETAS)
        pipe = Upscale(**parts, low_res_scheduler=low, max_noise_level=39)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def pictures(count, rows=8, columns=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, rows, columns, generator=generator, dtype=torch.float64)


def test_arguments_of_a_call(upscale, hold):
    pipe = upscale()
    one = {"image": pictures(1), "num_inference_steps": 2}
    first = hold(pipe, "plan", **one, noise_level=7)
    other = {"noise_level": 31, "image": pictures(1, seed=1)}
    assert not np.allclose(first, hold(pipe, "plan", **one | other))
    three = {"image": pictures(3, 9, 5), "prompt": ["red heart", "a star", "a moon"]}
    hold(pipe, "plan", **one | three, guidance_scale=1.0)
    two = {"image": pictures(2), "prompt": ["red", "blue"], "num_images_per_prompt": 2}
    hold(pipe, "plan", **one | two, negative_prompt=["", "green"], output_type="np")
    # this scheduler scales the latents, but not the constant channels
    pipe.scheduler = EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction")
    hold(pipe, "plan", 2e-6, **one)


def test_guidance_halves_share_picture_and_noise_level(upscale, monkeypatch):
    pipe, shapes = fastdiff.compile(upscale()), []
    predict = UNet.predict

    def seen(net, x, row, constants):
        shapes.append((x.shape[0], row.shape[0], constants.constant.made.shape[0]))
        return predict(net, x, row, constants)

    monkeypatch.setattr(UNet, "predict", seen)
    pipe(["red", "blue"], image=pictures(2), num_inference_steps=2)
    assert set(shapes) == {(2, 1, 2)}


def test_lora_with_the_scale_of_a_call(upscale, hold):
    pipe = upscale()
    pipe.unet.add_adapter(
        LoraConfig(r=4, target_modules=["to_q", "to_k", "conv_in"], init_lora_weights=False), "one"
    )
    pipe.unet.double()
    scaled = {"cross_attention_kwargs": {"scale": 0.3}}
    hold(pipe, "plan", image=pictures(1), num_inference_steps=2, **scaled)


def test_with_a_callback_diffusers_runs_the_loop(upscale, hold):
    pipe = upscale()
    seen = []
    call = {"image": pictures(1), "num_inference_steps": 2}
    hold(pipe, "callback", **call, callback=lambda i, t, latents: seen.append(i))
    assert seen == 2 * [0, 1]


def test_report_and_restore(upscale):
    pipe = upscale(torch.float32)
    call = {"image": pictures(1), "num_inference_steps": 2, "output_type": "np"}

    def drawn():
        return pipe("red", **call, generator=torch.Generator().manual_seed(1)).images

    want, state = drawn(), copy.deepcopy(pipe.unet.state_dict())
    fastdiff.compile(pipe)
    assert abs(drawn() - want).max() < 1e-4
    parts = {part.name: f"{part.runs}: {part.why}" for part in fastdiff.report(pipe).parts}
    assert (parts["unet"], parts["loop"]) == ("fastdiff: 2 calls", "fastdiff: 1 loop")
    assert parts["low_res_scheduler"] == "diffusers: not a network; once per picture"
    fastdiff.restore(pipe)
    assert (drawn() == want).all()
    assert all(torch.equal(state[name], value) for name, value in pipe.unet.state_dict().items())
