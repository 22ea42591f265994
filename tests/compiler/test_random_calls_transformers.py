"""Random calls of AuraFlow, Z-Image, Qwen-Image, FLUX.2 and FLUX.1 with a ControlNet, each against
the eager pipeline."""

import random
from unittest.mock import patch

import diffusers
import pytest
import torch
from random_calls import adapt, add_adapters, callback_of, exact_steps, single_draws
from small import AURAFLOW, FLUX, FLUX2, QWEN, ZIMAGE, noisy

import fastdiff
from fastdiff.kernels.contract import judge

SCHEDULERS = {
    "Euler": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "Euler a": (diffusers.FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
    "LCM": (diffusers.FlowMatchLCMScheduler, {}),
}
STEP = 5e-6
"""Relative error: the schedulers compute in float32, and loops amplify that."""
TARGETS = {
    "auraflow": ["to_q", "add_v_proj", "to_out.0", "linear_1", "norm1.linear", "context_embedder"],
    "zimage": ["to_q", "to_v", "to_out.0", "w1", "w2"],
    "qwen": ["to_q", "add_v_proj", "to_out.0", "img_mlp.net.2", "txt_in"],
    "flux2": ["to_qkv_mlp_proj", "linear_in", "to_add_out", "double_stream_modulation_img.linear"],
    "controlnet": ["to_q", "add_v_proj", "to_out.0", "proj_mlp", "x_embedder"],
}


def make(kind):
    """A pipeline with two LoRA adapters; its weights are the same at each call."""
    torch.manual_seed(3)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    if kind == "auraflow":
        net = noisy(diffusers.AuraFlowTransformer2DModel(**AURAFLOW))
        pipe = diffusers.AuraFlowPipeline(None, None, vae, net, scheduler)
    elif kind == "zimage":
        net = noisy(diffusers.ZImageTransformer2DModel(**ZIMAGE))
        pipe = diffusers.ZImagePipeline(scheduler, vae, None, None, net)
    elif kind == "flux2":
        net = noisy(diffusers.Flux2Transformer2DModel(**FLUX2, guidance_embeds=False))
        small = {"norm_num_groups": 4, "latent_channels": 4, "block_out_channels": (8, 8)}
        blocks = {
            f"{way}_block_types": (f"{way.title()}{name}coderBlock2D",) * 2
            for way, name in (("down", "En"), ("up", "De"))
        }
        vae = diffusers.AutoencoderKLFlux2(**small, **blocks).eval()
        pipe = diffusers.Flux2KleinPipeline(scheduler, vae, None, None, net)
    elif kind == "controlnet":
        net = noisy(diffusers.FluxTransformer2DModel(**FLUX | {"guidance_embeds": True}))
        control = noisy(diffusers.FluxControlNetModel(**FLUX | {"num_layers": 1}))
        small = {"norm_num_groups": 4, "latent_channels": 4, "shift_factor": 0.1}
        vae = diffusers.AutoencoderKL(block_out_channels=(8,), **small).eval()
        encoders = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        given = {"transformer": net, "controlnet": control, "scheduler": scheduler}
        pipe = diffusers.FluxControlNetPipeline(vae=vae, **given, **encoders)
    else:
        net = noisy(diffusers.QwenImageTransformer2DModel(**QWEN))
        small = {"base_dim": 8, "z_dim": 4, "dim_mult": [1], "num_res_blocks": 1}
        vae = diffusers.AutoencoderKLQwenImage(**small, temperal_downsample=[]).eval()
        pipe = diffusers.QwenImagePipeline(scheduler, vae, None, None, net)
    add_adapters(net, TARGETS[kind])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_call(dice):
    return {
        "kind": dice.choice(list(TARGETS)),
        "seed": dice.randrange(2**31),
        "scheduler": dice.choice(list(SCHEDULERS)),
        "steps": dice.randint(1, 4),
        "size": dice.choice([(8, 8), (16, 8), (6, 14), (12, 4)]),
        "images": dice.choice([1, 1, 2]),
        "guidance_scale": dice.choice([0.0, 1.0, 3.0, 7.0]),
        "lengths": (dice.randint(1, 40), dice.randint(1, 40)),
        "adapters": dice.choice([{}, {"one": 1.0}, {"two": 0.5}, {"one": 0.7, "two": -0.4}]),
        "scale": dice.choice([None, None, 0.5]),
        "callback": dice.choice([None, None, "looks", "changes"]),
        "controls": (dice.choice([0.0, 0.4]), dice.choice([0.6, 1.0]), dice.choice([0.0, 0.3, 1])),
    }


def texts(kind, call, noise):
    """Prompt embeddings in the form that this pipeline takes, of up to 40 tokens."""
    found = {}
    if kind == "controlnet":
        tokens, size = call["lengths"][0], call["size"]  # a latent is a pixel
        for name in ("", "negative_"):
            found[f"{name}prompt_embeds"] = noise(call["images"], tokens, 20)
            found[f"{name}pooled_prompt_embeds"] = noise(call["images"], 32)
        starts = ("control_guidance_start", "control_guidance_end", "controlnet_conditioning_scale")
        found |= dict(zip(starts, call["controls"], strict=True))
        return found | {"control_image": noise(1, 3, *size).tanh(), "guidance_scale": 3.5}
    for name, used in zip(("prompt", "negative_prompt"), call["lengths"], strict=True):
        text, mask = noise(1, 40, 24 if kind == "flux2" else 20), torch.arange(40)[None] < used
        if kind == "zimage":
            found[f"{name}_embeds"] = [text[0, :used]]
        elif kind == "flux2":
            found[f"{name}_embeds"] = text[:, : call["lengths"][0]]  # a plan takes equal ones
        elif kind == "qwen":
            found |= {f"{name}_embeds": text, f"{name}_embeds_mask": mask}
        else:
            text = text * mask[..., None]
            found |= {f"{name}_embeds": text, f"{name}_attention_mask": mask.long()}
    return found


def draw(pipe, call, exactly=False):
    """The latents of a call; `exactly`: with a scheduler that computes in float64."""
    kind, (cls, options) = call["kind"], SCHEDULERS[call["scheduler"]]
    pipe.scheduler = cls(**options)
    if exactly:
        exact_steps(pipe.scheduler)
    adapt(pipe.transformer, call["adapters"])
    torch.manual_seed(call["seed"])  # its schedulers use the global generator
    generator, dtype = torch.Generator().manual_seed(call["seed"]), pipe.transformer.dtype
    given = texts(kind, call, lambda *shape: torch.randn(shape, generator=generator).to(dtype))
    if call["scale"]:
        joint = kind in ("zimage", "controlnet")
        name = "joint_attention_kwargs" if joint else "attention_kwargs"
        given[name] = {"scale": call["scale"]}
    true = kind in ("qwen", "controlnet")
    given["true_cfg_scale" if true else "guidance_scale"] = call["guidance_scale"]
    with patch.object(torch, "randn", single_draws):
        return pipe(
            **given,
            **callback_of(call),
            height=call["size"][0] * pipe.vae_scale_factor,
            width=call["size"][1] * pipe.vae_scale_factor,
            num_images_per_prompt=1 if kind == "controlnet" else call["images"],
            num_inference_steps=call["steps"],
            generator=generator,
            output_type="latent",
        ).images.double()


def loops_of(call):
    """How many loops of a call run as a plan: with a callback diffusers' loop runs; in Qwen-Image
    and FLUX.2 only if the callback may see a history or change a text."""
    guided = call["guidance_scale"] > 1
    # without guidance a callback may change the tensor that was given to Qwen-Image's call
    changes = {"qwen": not guided, "flux2": guided}.get(call["kind"], True)
    return int(not (call["callback"] and (changes or call["scheduler"] == "LCM")))


def assert_planned(plans, loops):
    parts = [part for plan in plans for part in fastdiff.report(plan).parts]
    assert not any("eagerly" in part.why for part in parts)
    found = [int(part.why.split()[0]) for part in parts if part.name == "loop"]
    assert sum(found) == loops


def test_random_calls():
    """Each is within the error budget."""
    seed = 20261129
    dice, loops = random.Random(seed), 0
    pipes = {
        kind: (fastdiff.compile(make(kind)), make(kind), make(kind).to(torch.float64))
        for kind in TARGETS
    }
    for at in range(8):
        call = random_call(dice)
        loops += loops_of(call)
        plan, eager, exact = pipes[call["kind"]]
        got, single, truth = draw(plan, call), draw(eager, call), draw(exact, call, exactly=True)
        verdict = judge("latents", got.float(), single, truth)
        assert verdict.passed, f"seed {seed}, call {at}: {call}: {verdict}"
    assert_planned([plan for plan, *_ in pipes.values()], loops)


# In float32 a loop amplifies rounding, so some of many calls are outside the budget by chance.
@pytest.mark.product
def test_many_random_calls_in_float64():
    """Fifty of each kind."""
    seed = 20261130
    dice, loops = random.Random(seed), 0
    pipes = {
        kind: (fastdiff.compile(make(kind).to(torch.float64)), make(kind).to(torch.float64))
        for kind in TARGETS
    }
    for at in range(50 * len(TARGETS)):
        call = random_call(dice) | {"kind": [*TARGETS][at % len(TARGETS)]}
        loops += loops_of(call)
        got, want = (draw(pipe, call) for pipe in pipes[call["kind"]])
        off = abs(got - want).max() / max(1.0, abs(want).max())
        assert off <= STEP, f"seed {seed}, call {at}: {call}: {off}"
    assert_planned([plan for plan, _ in pipes.values()], loops)
