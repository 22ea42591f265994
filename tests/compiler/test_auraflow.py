"""AuraFlow's pipeline, compiled against eager."""

import copy

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
)
from exact import as_eager
from peft import LoraConfig
from small import AURAFLOW, noisy

import fastdiff
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.runtime.recordings import made

VAE = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}


def pipeline():
    transformer = noisy(AuraFlowTransformer2DModel(**AURAFLOW))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    pipe = AuraFlowPipeline(None, None, noisy(AutoencoderKL(**VAE)), transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, scale=3.5, used=9, images=1, **options):
    """A picture of 8×12 pixels; only the first `used` tokens of the prompt are not zero."""
    generator, texts = torch.Generator().manual_seed(3), {}
    for name, count in (("prompt", used), ("negative_prompt", 2)):
        embeds = torch.randn(1, 40, 20, generator=generator)
        embeds[:, count:] = 0
        texts[f"{name}_embeds"] = embeds.to(pipe.transformer.dtype)
        texts[f"{name}_attention_mask"] = torch.ones(1, 40)
    result = pipe(
        guidance_scale=scale,
        num_inference_steps=3,
        num_images_per_prompt=images,
        height=8,
        width=12,
        generator=generator,
        output_type="np",
        **texts,
        **options,
    ).images
    return torch.from_numpy(result)


@pytest.mark.parametrize("call", [{}, {"scale": 1.0}, {"used": 40, "images": 3}], ids=str)
def test_the_picture_report_and_restore(call):
    as_eager(pipeline(), drawn, **call)


def test_with_a_callback_diffusers_runs_the_loop():
    """diffusers' AuraFlow pipeline has no `interrupt`, so it could not finish a started plan."""
    pipe, seen = pipeline(), []
    options = {"callback_on_step_end": lambda _, i, t, given: seen.append(i) or given}
    eager = drawn(pipe, **options)
    fastdiff.compile(pipe)
    torch.testing.assert_close(drawn(pipe, **options), eager, atol=1e-5, rtol=0)
    assert seen == [0, 1, 2] * 2
    assert slot_of(pipe.transformer).fast == 3
    (why,) = loop_of(pipe).own
    assert "callback_on_step_end" in why


def test_adapters_and_edits_are_followed_without_a_new_recording():
    pipe = pipeline()
    net = pipe.transformer
    layers = ["to_q", "add_v_proj", "linear_1", "norm1.linear", "pos_embed.proj"]
    net.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False), "one")
    twin = copy.deepcopy(pipe)
    fastdiff.compile(pipe)
    for _ in range(2):  # the VAE is recorded at the second picture of a size
        drawn(pipe)
    before = made()
    for change in (
        lambda net: net.set_adapters("one", 0.5),
        lambda net: net.disable_lora(),
        lambda net: net.register_tokens.data.mul_(2),
        lambda net: net.pos_embed.proj.base_layer.weight.data.mul_(2),
    ):
        for one in (pipe, twin):
            change(one.transformer)
        torch.testing.assert_close(drawn(pipe), drawn(twin), atol=1e-5, rtol=0)
    scaled = {"attention_kwargs": {"scale": 0.3}}
    for one in (pipe, twin):
        one.transformer.enable_lora()
    torch.testing.assert_close(drawn(pipe, **scaled), drawn(twin, **scaled), atol=1e-5, rtol=0)
    assert loop_of(pipe).planned == 7
    assert made() == before
