"""Guidance by gradients: calls with gradients run in diffusers, the others in fastdiff."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from small import noisy
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

import fastdiff
from fastdiff.compiler.slot import slot_of
from fastdiff.kernels.contract import judge

STEPS = 3
FILE = Path(__file__).parent.parent / "clip_guided.py"


@pytest.fixture
def pipe(components, tmp_path, monkeypatch):
    """A CLIP-guided community pipeline, loaded as diffusers loads custom pipelines."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    parts = components(False, torch.float32)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "projection_dim": 12}
    words = len(parts["tokenizer"])
    ends = {"vocab_size": words, "bos_token_id": words - 2, "eos_token_id": words - 1}
    config = CLIPConfig(
        text_config=sizes | ends,
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path,
        custom_pipeline=str(FILE),
        trust_remote_code=True,
        clip_model=noisy(CLIPModel(config)),
        feature_extractor=CLIPImageProcessor(size=16),
    )
    assert type(pipe).__module__.startswith("diffusers_modules")
    pipe.set_progress_bar_config(disable=True)
    pipe.freeze_vae()
    pipe.freeze_unet()
    # copies the weights, because memory-mapped ones are unaligned and backward rounds differently
    return pipe.to(torch.float64).to(torch.float32)


def drawn(pipe, **options):
    """The picture and the gradients of every step."""
    pipe.gradients.clear()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    picture = pipe("red heart", noise=noise, num_inference_steps=STEPS, **options)
    return [picture, *pipe.gradients]


def calls(pipe):
    slots = {"unet": slot_of(pipe.unet), "vae": slot_of(pipe.vae.decoder)}
    return {name: (slot.fast, dict(slot.eager)) for name, slot in slots.items()}


def test_clip_guidance(pipe):
    double = copy.deepcopy(pipe)
    for name in ("unet", "vae", "text_encoder", "clip_model"):
        getattr(double, name).double()
    scales = (100, 0)
    eager = [drawn(pipe, clip_guidance_scale=scale) for scale in scales]
    truth = [drawn(double, clip_guidance_scale=scale) for scale in scales]
    assert [len(values) for values in truth] == [1 + STEPS, 1]
    assert (truth[0][0] - truth[1][0]).abs().max() > 0.01  # CLIP changes the picture
    fastdiff.compile(pipe)
    assert "CLIP's gradients" in str(fastdiff.report(pipe))
    asked, fast = {"its inputs ask for gradients": STEPS}, 0
    for scale, own, exact in zip(scales, eager, truth, strict=True):
        for number, values in enumerate(
            zip(drawn(pipe, clip_guidance_scale=scale), own, exact, strict=True)
        ):
            verdict = judge(f"{scale}, {number}", *values)
            assert verdict.passed, verdict
        fast += STEPS
        assert calls(pipe) == {"unet": (fast, asked), "vae": (fast // STEPS, asked)}
    assert f"{STEPS} calls ran eagerly: its inputs ask for gradients" in str(fastdiff.report(pipe))
    fastdiff.restore(pipe)
    for values in zip(drawn(pipe), eager[0], strict=True):
        assert torch.equal(*values)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_users_own_loop(unet, frozen):
    """Gradients of the latents, and of the weights unless they are frozen."""
    torch.manual_seed(0)
    decoder = noisy(AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=4))
    unet.double().requires_grad_(not frozen)
    decoder.double().requires_grad_(not frozen)
    start = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    text = torch.randn(1, 7, 24, dtype=torch.float64)

    def steps():
        latents, found = start, []
        for t in (9, 5):
            with torch.enable_grad():
                asked = latents.detach().requires_grad_()
                clean = asked - unet(asked, t, text).sample
                loss = decoder.decode(clean).sample.square().mean()
                weights = [] if frozen else [unet.conv_in.weight, decoder.decoder.conv_out.weight]
                found += torch.autograd.grad(loss, [asked, *weights])
            with torch.no_grad():
                latents = latents - unet(latents, t, text).sample - 0.1 * found[-1].mean()
        return [latents, *found]

    want = steps()
    fastdiff.compile(unet)
    fastdiff.compile(decoder)
    for got, own in zip(steps(), want, strict=True):
        torch.testing.assert_close(got, own, rtol=1e-10, atol=1e-10)
    assert (slot_of(unet).fast, sum(slot_of(unet).eager.values())) == (2, 2)
    assert sum(slot_of(decoder.decoder).eager.values()) == 2
