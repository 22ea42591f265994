"""Random calls, each against the same call of the eager pipeline."""

import os
import random
from pathlib import Path
from statistics import median
from unittest.mock import patch

import diffusers
import pytest
import torch
from alive import live_bytes
from diffusers import (
    StableDiffusion3Pipeline,
    StableDiffusionPAGInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from random_calls import adapt, add_adapters, callback_of, exact_steps, single_draws
from small import FLUX, SD3, SD3_KINDS, TINY, noisy
from unclip import kandinsky_parts, scheduler

import fastdiff
from fastdiff.kernels.contract import judge

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False, "steps_offset": 1}),
    "DDIM clipped": (diffusers.DDIMScheduler, {"clip_sample": True, "steps_offset": 1}),
    "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}),
    "Euler": (diffusers.EulerDiscreteScheduler, {}),
    "Euler a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "DPM++ 2M Karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "DPM++ SDE": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
    "Heun": (diffusers.HeunDiscreteScheduler, {}),
    "LCM": (diffusers.LCMScheduler, {}),
}
HISTORIES = ("PNDM", "DPM++ 2M Karras", "DPM++ SDE", "UniPC", "Heun")
"""Their state includes predictions or samples, so with a callback diffusers' loop runs."""
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}


def make(xl):
    """A pipeline with two LoRA adapters; its weights are the same at each call."""
    torch.manual_seed(3)
    unet = diffusers.UNet2DConditionModel(**TINY, **(XL if xl else {})).eval()
    add_adapters(unet, ["to_q", "to_v", "to_out.0", "conv1"])
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8).eval()
    scheduler = diffusers.DDIMScheduler(**BETAS)
    if xl:
        pipe = StableDiffusionXLPipeline(
            vae, None, None, None, None, unet, scheduler, add_watermarker=False
        )
    else:
        pipe = StableDiffusionPipeline(
            vae, None, None, unet, scheduler, None, None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_call(dice):
    return {
        "seed": dice.randrange(2**31),
        "scheduler": dice.choice(list(SCHEDULERS)),
        "steps": dice.randint(1, 5),
        "size": dice.choice([(8, 8), (16, 8), (8, 24), (16, 16)]),
        "images": dice.choice([1, 1, 2]),
        "guidance_scale": dice.choice([0.0, 1.0, 3.0, 7.5]),
        "guidance_rescale": dice.choice([0.0, 0.0, 0.7]),
        "adapters": dice.choice([{}, {"one": 1.0}, {"two": 0.5}, {"one": 0.7, "two": -0.4}]),
        "callback": dice.choice([None, None, "looks", "changes"]),
    }


def latents_of(pipe, call, generator, given):
    """The latents of a call; `given` are the arguments of its kind of pipeline."""
    height, width = call["size"]
    with patch.object(torch, "randn", single_draws):
        return pipe(
            **given,
            **callback_of(call),
            height=height * pipe.vae_scale_factor,
            width=width * pipe.vae_scale_factor,
            num_inference_steps=call["steps"],
            guidance_scale=call["guidance_scale"],
            generator=generator,
            output_type="latent",
        ).images.double()


def draw(pipe, call):
    """The latents of a call."""
    kind, options = SCHEDULERS[call["scheduler"]]
    pipe.scheduler = kind.from_config({**BETAS, **options})
    adapt(pipe.unet, call["adapters"])
    generator = torch.Generator().manual_seed(call["seed"])
    dtype = pipe.unet.dtype

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    given = {"prompt_embeds": noise(1, 7, 24), "negative_prompt_embeds": noise(1, 7, 24)}
    if "XL" in type(pipe).__name__:
        given |= {
            "pooled_prompt_embeds": noise(1, 16),
            "negative_pooled_prompt_embeds": noise(1, 16),
        }
    given["num_images_per_prompt"] = call["images"]
    given["guidance_rescale"] = call["guidance_rescale"]
    return latents_of(pipe, call, generator, given)


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("xl", "calls"),
    [
        pytest.param(False, 24, id="sd"),
        pytest.param(True, 10, id="sdxl"),
        pytest.param(False, 120, id="sd, more", marks=pytest.mark.product),
        pytest.param(True, 60, id="sdxl, more", marks=pytest.mark.product),
    ],
)
def test_random_calls(xl, calls):
    """Each picture is within the error budget of `kernels.contract`. With 120 calls shapes repeat,
    and memory must stay flat. Shorter runs are the beginning of the longer ones."""
    seed = 20261122 + xl
    dice = random.Random(seed)
    plan, eager, exact = fastdiff.compile(make(xl)), make(xl), make(xl).to(torch.float64)
    live, resident, shows = [], [], 0
    for at in range(calls):
        call = random_call(dice)
        shows += call["callback"] is not None and call["scheduler"] in HISTORIES
        got, single, truth = draw(plan, call), draw(eager, call), draw(exact, call)
        verdict = judge("latents", got.float(), single, truth)
        assert verdict.passed, f"seed {seed}, call {at}: {call}: {verdict}"
        if at % 6 == 5:
            live.append(live_bytes())
            resident.append(resident_bytes())
    (loop,) = [part for part in fastdiff.report(plan).parts if part.name == "loop"]
    # most calls that need not show a history to a callback ran as plans
    assert int(loop.why.split()[0]) >= 0.8 * (calls - shows), loop
    if calls == 120:
        for sizes in (live, resident):
            assert median(sizes[15:]) <= 1.02 * median(sizes[5:10])


def make_masked():
    """An inpainting pipeline with perturbed attention guidance."""
    parts = {name: value for name, value in make(xl=False).components.items() if value is not None}
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPAGInpaintPipeline(**absent | parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_call_masked(dice):
    return random_call(dice) | {
        "steps": dice.randint(2, 5),
        "guidance_rescale": 0.0,
        "strength": dice.choice([0.5, 1.0]),
        "pag_scale": dice.choice([0.0, 1.0, 3.0]),
        "pag_adaptive_scale": dice.choice([0.0, 0.002]),
        "layers": dice.choice(["mid", "down_blocks.0", ["mid", "up_blocks.1"]]),
    }


def draw_masked(pipe, call):
    """The latents of a call whose picture is given as latents."""
    kind, options = SCHEDULERS[call["scheduler"]]
    pipe.scheduler = kind.from_config({**BETAS, **options})
    adapt(pipe.unet, call["adapters"])
    pipe.set_pag_applied_layers(call["layers"])
    generator = torch.Generator().manual_seed(call["seed"])
    height, width = call["size"]

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(pipe.unet.dtype)

    given = {
        "prompt_embeds": noise(1, 7, 24),
        "negative_prompt_embeds": noise(1, 7, 24),
        "image": noise(1, 4, height, width),
        "masked_image_latents": noise(1, 4, height, width),
        "mask_image": (noise(1, 1, height, width) > 0).float(),
        "num_images_per_prompt": call["images"],
    }
    given |= {name: call[name] for name in ("strength", "pag_scale", "pag_adaptive_scale")}
    return latents_of(pipe, call, generator, given)


@pytest.mark.parametrize("calls", [10, pytest.param(60, marks=pytest.mark.product)])
def test_random_calls_with_perturbed_attention_and_masks(calls):
    """Each is within the error budget; at least half of the calls run as plans."""
    seed = 20261128
    dice = random.Random(seed)
    plan, eager = fastdiff.compile(make_masked()), make_masked()
    exact = make_masked().to(torch.float64)
    for at in range(calls):
        call = random_call_masked(dice)
        got, single, truth = (draw_masked(pipe, call) for pipe in (plan, eager, exact))
        verdict = judge("latents", got.float(), single, truth)
        assert verdict.passed, f"seed {seed}, call {at}: {call}: {verdict}"
    (loop,) = [part for part in fastdiff.report(plan).parts if part.name == "loop"]
    assert int(loop.why.split()[0]) >= 0.5 * calls, loop


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
FLOW_SCHEDULERS = {
    "Euler": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "Euler, shifted": (diffusers.FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}),
    "Euler a": (diffusers.FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
    "Heun": (diffusers.FlowMatchHeunDiscreteScheduler, {"shift": 3.0}),
    "LCM": (diffusers.FlowMatchLCMScheduler, {}),
    "DPM++": (diffusers.DPMSolverMultistepScheduler, FLOW),
    "UniPC": (diffusers.UniPCMultistepScheduler, FLOW),
}
FLOW_HISTORIES = ("Heun", "LCM", "DPM++", "UniPC")


def make_sd3(kind):
    """A pipeline with two LoRA adapters; its weights are the same at each call."""
    torch.manual_seed(3)
    channels = {"in_channels": 4, "out_channels": 4}
    net = noisy(diffusers.SD3Transformer2DModel(**SD3 | SD3_KINDS[kind] | channels))
    add_adapters(net, ["to_q", "add_v_proj", "to_out.0", "ff.net.2", "norm1.linear"])
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    texts = dict.fromkeys(
        f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")
    )
    pipe = StableDiffusion3Pipeline(transformer=net, vae=vae, scheduler=scheduler, **texts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_call_sd3(dice):
    return {
        "kind": dice.choice(list(SD3_KINDS)),
        "seed": dice.randrange(2**31),
        "scheduler": dice.choice(list(FLOW_SCHEDULERS)),
        "steps": dice.randint(1, 5),
        "size": dice.choice([(8, 8), (16, 8), (6, 14), (16, 16)]),
        "images": dice.choice([1, 1, 2]),
        "guidance_scale": dice.choice([0.0, 1.0, 3.0, 7.0]),
        "t5": dice.choice([True, False]),
        "adapters": dice.choice([{}, {"one": 1.0}, {"two": 0.5}, {"one": 0.7, "two": -0.4}]),
        "scale": dice.choice([None, None, 0.5]),
        "skips": dice.choice([None, None, [1], [0, 2]]),
        "callback": dice.choice([None, None, "looks", "changes"]),
    }


def draw_sd3(pipe, call):
    """The latents of a call."""
    kind, options = FLOW_SCHEDULERS[call["scheduler"]]
    pipe.scheduler = kind(**options)
    if pipe.transformer.dtype == torch.float64:
        exact_steps(pipe.scheduler)
    adapt(pipe.transformer, call["adapters"])
    torch.manual_seed(call["seed"])  # its schedulers use the global generator
    generator, dtype = torch.Generator().manual_seed(call["seed"]), pipe.transformer.dtype
    given, count = {}, call["images"]
    for negative in ("", "negative_"):
        text = torch.randn(count, 20, 72, generator=generator)
        text[:, 7:] *= call["t5"]
        pooled = torch.randn(count, 64, generator=generator)
        given[f"{negative}prompt_embeds"] = text.to(dtype)
        given[f"{negative}pooled_prompt_embeds"] = pooled.to(dtype)
    if call["scale"]:
        given["joint_attention_kwargs"] = {"scale": call["scale"]}
    if call["skips"]:
        given |= {"skip_guidance_layers": call["skips"], "skip_layer_guidance_stop": 0.6}
    return latents_of(pipe, call, generator, given)


@pytest.mark.parametrize("calls", [20, pytest.param(100, marks=pytest.mark.product)])
def test_random_calls_of_sd3(calls):
    """Each is within the error budget, and runs as a plan, unless a callback may see a scheduler's
    history or change the call's own embeddings."""
    seed = 20261128
    dice = random.Random(seed)
    pipes = {
        kind: (
            fastdiff.compile(make_sd3(kind)),
            make_sd3(kind),
            make_sd3(kind).to(torch.float64),
        )
        for kind in SD3_KINDS
    }
    shows = 0
    for at in range(calls):
        call = random_call_sd3(dice)
        unguided = call["guidance_scale"] <= 1
        shows += bool(call["callback"]) and (unguided or call["scheduler"] in FLOW_HISTORIES)
        got, single, truth = (draw_sd3(pipe, call) for pipe in pipes[call["kind"]])
        verdict = judge("latents", got.float(), single, truth)
        assert verdict.passed, f"seed {seed}, call {at}: {call}: {verdict}"
    parts = [part for plan, *_ in pipes.values() for part in fastdiff.report(plan).parts]
    assert not any("eagerly" in part.why for part in parts)
    loops = [int(part.why.split()[0]) for part in parts if part.name == "loop"]
    assert sum(loops) == calls - shows


UPSCALER = {
    "in_channels": 7,
    "num_class_embeds": 50,
    "only_cross_attention": (True, False),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}


def make_upscaler():
    """A pipeline with two LoRA adapters; its weights are the same at each call."""
    torch.manual_seed(3)
    unet = noisy(diffusers.UNet2DConditionModel(**TINY | UPSCALER))
    add_adapters(unet, ["to_q", "to_v", "to_out.0", "conv_in"])
    config = {"block_out_channels": (32,), "norm_num_groups": 8, "scaling_factor": 0.08333}
    vae = diffusers.AutoencoderKL(**config).eval()
    low, scheduler = diffusers.DDPMScheduler(**BETAS), diffusers.DDIMScheduler(**BETAS)
    pipe = diffusers.StableDiffusionUpscalePipeline(
        vae, None, None, unet, low, scheduler, max_noise_level=49
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def upscaled(pipe, call):
    """The latents of a call."""
    kind, options = SCHEDULERS[call["scheduler"]]
    pipe.scheduler = kind.from_config({**BETAS, **options, "prediction_type": "v_prediction"})
    adapt(pipe.unet, call["adapters"])
    generator = torch.Generator().manual_seed(call["seed"])
    count, dtype = call["images"], pipe.unet.dtype

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    with patch.object(torch, "randn", single_draws):
        return pipe(
            image=noise(count, 3, *call["size"]).sigmoid(),
            prompt_embeds=noise(count, 7, 24),
            negative_prompt_embeds=noise(count, 7, 24),
            noise_level=call["seed"] % 50,
            num_inference_steps=call["steps"],
            guidance_scale=call["guidance_scale"],
            generator=generator,
            output_type="latent",
        ).images.double()


@pytest.mark.parametrize("calls", [6, pytest.param(60, marks=pytest.mark.product)])
def test_random_calls_of_the_upscaler(calls):
    """Each is within the error budget and runs as a plan."""
    seed = 20261129
    dice = random.Random(seed)
    plan, eager = fastdiff.compile(make_upscaler()), make_upscaler()
    exact = make_upscaler().to(torch.float64)
    for at in range(calls):
        call = random_call(dice)
        got, single, truth = (upscaled(pipe, call) for pipe in (plan, eager, exact))
        verdict = judge("latents", got.float(), single, truth)
        assert verdict.passed, f"seed {seed}, call {at}: {call}: {verdict}"
    (loop,) = [part for part in fastdiff.report(plan).parts if part.name == "loop"]
    assert loop.why == f"{calls} loops"


def make_prior(tokenizer):
    """A pipeline with two LoRA adapters; its weights are the same at each call."""
    torch.manual_seed(3)
    pipe = diffusers.KandinskyV22PriorPipeline(**kandinsky_parts(tokenizer))
    add_adapters(pipe.prior, ["to_q", "to_v", "to_out.0", "ff.net.2", "proj_in"])
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float32)


def random_call_prior(dice):
    prompts = dice.choice([["red heart"], ["blue star"], ["a", "red heart blue star"]])
    return {
        "seed": dice.randrange(2**31),
        "clip_sample": dice.choice([True, True, False]),
        "steps": dice.randint(2, 6),
        "prompts": prompts,
        "negative": dice.choice([None, ["green"] * len(prompts)]),
        "images": dice.choice([1, 1, 2]),
        "guidance_scale": dice.choice([0.0, 1.0, 3.0, 7.0]),
        "adapters": dice.choice([{}, {"one": 1.0}, {"two": 0.5}, {"one": 0.7, "two": -0.4}]),
    }


def draw_prior(pipe, call):
    """The embeddings of a call."""
    pipe.scheduler = scheduler(clip_sample=call["clip_sample"])
    adapt(pipe.prior, call["adapters"])
    with patch.object(torch, "randn", single_draws):
        return pipe(
            call["prompts"],
            negative_prompt=call["negative"],
            num_images_per_prompt=call["images"],
            num_inference_steps=call["steps"],
            guidance_scale=call["guidance_scale"],
            generator=torch.Generator().manual_seed(call["seed"]),
        ).image_embeds.double()


@pytest.mark.parametrize("calls", [10, pytest.param(100, marks=pytest.mark.product)])
def test_random_calls_of_the_prior(tokenizer, calls):
    """Each is within the error budget and runs as a plan."""
    seed = 20261129
    dice = random.Random(seed)
    plan, eager = fastdiff.compile(make_prior(tokenizer)), make_prior(tokenizer)
    exact = make_prior(tokenizer).to(torch.float64)
    for at in range(calls):
        call = random_call_prior(dice)
        got, single, truth = (draw_prior(pipe, call) for pipe in (plan, eager, exact))
        verdict = judge("embedding", got.float(), single, truth)
        assert verdict.passed, f"seed {seed}, call {at}: {call}: {verdict}"
    parts = {part.name: part.why for part in fastdiff.report(plan).parts}
    assert parts["loop"] == f"{calls} loops"


FLUX_SCHEDULERS = {
    name: FLOW_SCHEDULERS[name] for name in ("Euler", "Euler, shifted", "Euler a", "LCM")
}
"""The schedulers that accept sigmas."""
FLUX_CLASSES = {
    "text": (diffusers.FluxPipeline, {}),
    "picture": (diffusers.FluxImg2ImgPipeline, {}),
    "mask": (diffusers.FluxInpaintPipeline, {}),
    "control": (diffusers.FluxControlPipeline, {"in_channels": 32, "out_channels": 16}),
}


def make_flux(name, guidance_embeds):
    """A pipeline with two LoRA adapters; its weights are the same at each call."""
    cls, config = FLUX_CLASSES[name]
    net = noisy(diffusers.FluxTransformer2DModel(**FLUX | config, guidance_embeds=guidance_embeds))
    add_adapters(net, ["to_q", "add_v_proj", "proj_mlp", "proj_out", "norm1.linear"])
    vae = noisy(diffusers.AutoencoderKL(block_out_channels=(32,), shift_factor=0.1))
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = cls(transformer=net, vae=vae, scheduler=scheduler, **dict.fromkeys(names))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_call_flux(dice):
    return {
        "pipeline": dice.choice(list(FLUX_CLASSES)),
        "guidance_embeds": dice.choice([True, False]),
        "seed": dice.randrange(2**31),
        "scheduler": dice.choice(list(FLUX_SCHEDULERS)),
        "steps": dice.randint(2, 5),
        "size": dice.choice([(8, 8), (16, 8), (6, 14)]),
        "images": dice.choice([1, 1, 3]),
        "tokens": dice.choice([1, 7]),
        "guidance_scale": dice.choice([1.0, 3.5]),
        "true": dice.choice([None, None, 2.5]),
        "adapters": dice.choice([{}, {"one": 1.0}, {"two": 0.5}, {"one": 0.7, "two": -0.4}]),
        "scale": dice.choice([None, None, 0.5]),
    }


def draw_flux(pipe, call):
    """The latents of a call."""
    kind, options = FLUX_SCHEDULERS[call["scheduler"]]
    pipe.scheduler = kind(**options)
    if pipe.transformer.dtype == torch.float64:
        exact_steps(pipe.scheduler)
    adapt(pipe.transformer, call["adapters"])
    torch.manual_seed(call["seed"])  # its schedulers use the global generator
    generator, dtype = torch.Generator().manual_seed(call["seed"]), pipe.transformer.dtype
    count, (height, width) = call["images"], call["size"]

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    given = {"joint_attention_kwargs": {"scale": call["scale"]} if call["scale"] else None}
    for negative in ("", "negative_") if call["true"] and call["pipeline"] != "control" else ("",):
        given[f"{negative}prompt_embeds"] = noise(count, call["tokens"], 20)
        given[f"{negative}pooled_prompt_embeds"] = noise(count, 32)
    if len(given) > 3:
        given["true_cfg_scale"] = call["true"]
    picture = noise(count, 3, height, width).sigmoid()
    if call["pipeline"] in ("picture", "mask"):
        given |= {"image": picture, "strength": 0.7}
    if call["pipeline"] == "mask":
        given["mask_image"] = (noise(count, 1, height, width) > 0).to(dtype)
    if call["pipeline"] == "control":
        given["control_image"] = picture
    with patch.object(torch, "randn", single_draws):
        return pipe(
            **given,
            height=height,
            width=width,
            num_inference_steps=call["steps"],
            guidance_scale=call["guidance_scale"],
            generator=generator,
            output_type="latent",
        ).images.double()


@pytest.mark.parametrize("calls", [6, pytest.param(50, marks=pytest.mark.product)])
def test_random_calls_of_flux(calls):
    """Each is within the error budget and runs as a plan."""
    seed = 20261129
    dice = random.Random(seed)
    pipes = {}
    for at in range(calls):
        call = random_call_flux(dice)
        key = call["pipeline"], call["guidance_embeds"]
        if key not in pipes:
            plan, eager, exact = (make_flux(*key) for _ in range(3))
            pipes[key] = fastdiff.compile(plan), eager, exact.to(torch.float64)
        got, single, truth = (draw_flux(pipe, call) for pipe in pipes[key])
        verdict = judge("latents", got.float(), single, truth)
        assert verdict.passed, f"seed {seed}, call {at}: {call}: {verdict}"
    loops = [part for plan, *_ in pipes.values() for part in fastdiff.report(plan).parts]
    planned = [int(part.why.split()[0]) for part in loops if part.name == "loop"]
    assert sum(planned) == calls
