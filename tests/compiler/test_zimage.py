"""Z-Image's pipeline, compiled against eager."""

import copy

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from exact import as_eager
from small import ZIMAGE, noisy

import fastdiff
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of

VAE = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}


def pipeline(dtype=torch.float32):
    transformer = noisy(ZImageTransformer2DModel(**ZIMAGE)).to(dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = noisy(AutoencoderKL(**VAE, shift_factor=0.1)).to(dtype)
    pipe = ZImagePipeline(scheduler, vae, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, scale=5.0, images=1, lengths=(40, 5), **options):
    """Latents of 8×12; `lengths` are the tokens of the prompt and of the negative prompt."""
    generator, dtype = torch.Generator().manual_seed(3), pipe.transformer.dtype
    own, other = (torch.randn(n, 20, generator=generator).to(dtype) for n in lengths)
    return pipe(
        prompt_embeds=[own],
        negative_prompt_embeds=[other],
        guidance_scale=scale,
        num_inference_steps=3,
        num_images_per_prompt=images,
        height=8,
        width=12,
        generator=generator,
        output_type="latent",
        **options,
    ).images


@pytest.mark.parametrize("call", [{}, {"scale": 0.0}, {"images": 2, "lengths": (9, 5)}], ids=str)
def test_the_latents_report_and_restore(call):
    """The latents are float32 for a network of any dtype."""
    as_eager(pipeline(), drawn, **call)


def test_a_network_in_bfloat16():
    pipe = pipeline(torch.bfloat16)
    eager = drawn(pipe)
    truth = drawn(copy.deepcopy(pipe).to(torch.float32))
    fastdiff.compile(pipe)
    ours = drawn(pipe)
    assert loop_of(pipe).planned == 1
    assert ours.dtype == torch.float32
    assert (ours - truth).abs().max() <= 2 * (eager - truth).abs().max()
    given = {"latents": torch.randn(1, 4, 8, 12, dtype=torch.bfloat16)}
    assert drawn(pipe, **given).dtype == torch.float32  # a step of diffusers' loop converts them


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"cfg_normalization": 0.5}, "it was given cfg_normalization of 0.5"),
        ({"cfg_truncation": 0.3}, "it was given cfg_truncation of 0.3"),
        ({"callback_on_step_end": lambda *given: given[-1]}, "a callback may replace one half"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_without_a_plan_run_in_diffusers_loop(options, why):
    """diffusers' loop runs around the compiled network."""
    pipe = pipeline()
    eager = drawn(pipe, **options)
    fastdiff.compile(pipe)
    torch.testing.assert_close(drawn(pipe, **options), eager, atol=1e-5, rtol=1e-5)
    assert slot_of(pipe.transformer).fast == 3
    assert any(why in reason for reason in loop_of(pipe).own)
