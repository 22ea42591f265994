"""Qwen-Image's pipeline, compiled against eager."""

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from exact import as_eager
from small import QWEN, noisy

import fastdiff
from fastdiff.compiler.pipelines import loop_of


def pipeline():
    transformer = noisy(QwenImageTransformer2DModel(**QWEN))
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = QwenImagePipeline(scheduler, vae, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, scale=4.0, images=1, lengths=(7, 4), **options):
    """Latents; `lengths` says how many of 9 tokens the prompt and the negative prompt use."""
    generator, texts, dtype = torch.Generator().manual_seed(3), {}, pipe.transformer.dtype
    for name, used in zip(("prompt", "negative_prompt"), lengths, strict=True):
        texts[f"{name}_embeds"] = torch.randn(1, 9, 20, generator=generator).to(dtype)
        texts[f"{name}_embeds_mask"] = torch.arange(9)[None] < used
    size = 4 * pipe.vae_scale_factor
    return pipe(
        true_cfg_scale=scale,
        num_inference_steps=3,
        num_images_per_prompt=images,
        height=size,
        width=size + 2 * pipe.vae_scale_factor,
        generator=generator,
        output_type="latent",
        **texts,
        **options,
    ).images


@pytest.mark.parametrize("call", [{}, {"scale": 1.0}, {"images": 2, "lengths": (9, 9)}], ids=str)
def test_the_latents_report_and_restore(call):
    """True classifier-free guidance rescales each token to its norm in the prompt's prediction."""
    as_eager(pipeline(), drawn, **call)


def test_a_callback_changes_latents_and_text():
    pipe = pipeline()

    def change(pipe, i, t, given):
        return {"latents": given["latents"] * 0.9, "prompt_embeds": torch.ones(1, 9, 20)}

    eager = drawn(pipe, callback_on_step_end=change)
    fastdiff.compile(pipe)
    ours = drawn(pipe, callback_on_step_end=change)
    torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-5)
    assert loop_of(pipe).planned == 1
