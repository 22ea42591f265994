"""Random calls of DiT and PixArt, each against the same call of the eager pipeline."""

import random
from contextlib import nullcontext

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from small import DIT, PIXART, noisy

import fastdiff
from fastdiff.bench.pixels import noise_as
from fastdiff.compiler.pipelines import loop_of
from fastdiff.kernels.contract import judge

SCHEDULERS = {
    "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "DDIM, clipped": lambda: diffusers.DDIMScheduler(clip_sample=True),
    "DDPM": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "DPM++": diffusers.DPMSolverMultistepScheduler,
    "DPM++ SDE": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "UniPC": diffusers.UniPCMultistepScheduler,
    "Heun": diffusers.HeunDiscreteScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "Euler a": diffusers.EulerAncestralDiscreteScheduler,
}
SCALED = ("Heun", "Euler", "Euler a")
"""They scale the network's input; DiT's loop in diffusers steps the scaled latents."""
VAE = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 4}
TARGETS = ["to_q", "to_out.0", "ff.net.2", "proj_out"]


def adapted(net, more):
    """The network with two LoRA adapters, also on the layers `more`; these classes have no
    `add_adapter`."""
    for name, rank in (("one", 2), ("two", 5)):
        config = LoraConfig(r=rank, target_modules=TARGETS + more, init_lora_weights=False)
        inject_adapter_in_model(config, net, name)
    return net.eval()


def adapt(net, adapters):
    """Activate these adapters with their weights, and deactivate the others."""
    for layer in net.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(bool(adapters))
            if adapters:
                layer.set_adapter(list(adapters))
            for name, weight in adapters.items():
                layer.set_scale(name, weight)


def dit(kind):
    torch.manual_seed(3)
    config = DIT | ({"out_channels": 4} if kind == "without a variance" else {})
    transformer = adapted(noisy(diffusers.DiTTransformer2DModel(**config)), ["norm1.linear"])
    return DiTPipeline(transformer, noisy(AutoencoderKL(**VAE)), SCHEDULERS["DDIM"]())


def pixart(kind):
    torch.manual_seed(3)
    cls, config = PixArtSigmaPipeline, {}
    if kind != "sigma":
        cls, config = PixArtAlphaPipeline, {"sample_size": 128, "use_additional_conditions": True}
    net = noisy(diffusers.PixArtTransformer2DModel(**PIXART | config))
    transformer = adapted(net, ["adaln_single.linear", "to_k"])
    return cls(None, None, noisy(AutoencoderKL(**VAE)), transformer, SCHEDULERS["DPM++"]())


def random_call(dice):
    return {
        "seed": dice.randrange(2**31),
        "scheduler": dice.choice(list(SCHEDULERS)),
        "steps": dice.randint(1, 5),
        "pictures": dice.choice([1, 1, 2, 3]),
        "copies": dice.choice([1, 1, 2]),
        "size": dice.choice([(8, 8), (16, 8), (8, 24)]),
        "guidance_scale": dice.choice([0.0, 0.6, 1.0, 1.5, 4.5]),
        "eta": dice.choice([0.0, 0.0, 0.7]),
        "mask": dice.choice(["prefix", "holes", "all", "float"]),
        "adapters": dice.choice([{}, {"one": 1.0}, {"two": 0.5}, {"one": 0.7, "two": -0.4}]),
    }


def masked(kind, count, dice):
    """A mask [count, 19] of zeros and ones."""
    lengths = torch.tensor([[dice.randint(1, 19)] for _ in range(count)])
    mask = (torch.arange(19)[None] < lengths).long()
    if kind == "holes":
        mask = mask * torch.tensor([[dice.randint(0, 1) for _ in range(19)] for _ in lengths])
        mask[:, 0] = 1
    return torch.ones_like(mask) if kind == "all" else mask.float() if kind == "float" else mask


def draw(pipe, call):
    """The picture of a call, from the same noise in each dtype."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS[call["scheduler"]]()
    net = pipe.transformer
    adapt(net, call["adapters"])
    torch.manual_seed(call["seed"])  # DiT's scheduler uses the global generator
    generator, dice = torch.Generator().manual_seed(call["seed"]), random.Random(call["seed"])
    many, given = call["pictures"], {}
    if isinstance(pipe, DiTPipeline):
        given["class_labels"] = [dice.randrange(1000) for _ in range(many)]
    else:
        height, width = call["size"]
        given |= {"prompt": None, "negative_prompt": None, "height": height, "width": width}
        for name in ("prompt", "negative_prompt"):
            text = torch.randn(many, 19, 20, generator=generator)
            given[f"{name}_embeds"] = text.to(net.dtype)
            given[f"{name}_attention_mask"] = masked(call["mask"], many, dice)
        given |= {"num_images_per_prompt": call["copies"], "use_resolution_binning": False}
        given["eta"] = call["eta"]
    options = {"guidance_scale": call["guidance_scale"], "num_inference_steps": call["steps"]}
    double = net.dtype == torch.float64
    with noise_as(pipe, torch.float32) if double else nullcontext():
        images = pipe(**given, **options, generator=generator, output_type="np").images
    return torch.from_numpy(images)


def result(pipe, call):
    """The picture, or the message of the error that was raised."""
    try:
        return draw(pipe, call)
    except (TypeError, IndexError, ValueError) as error:
        return str(error)


KINDS = {
    "dit": lambda: dit(""),
    "dit without a variance": lambda: dit("without a variance"),
    "alpha": lambda: pixart("alpha"),
    "sigma": lambda: pixart("sigma"),
}


@pytest.mark.parametrize("calls", [2, pytest.param(50, marks=pytest.mark.product)])
@pytest.mark.parametrize("kind", KINDS)
def test_random_calls(kind, calls):
    """Each is within the error budget; shorter runs are the beginning of the longer ones."""
    seed = 20261129
    dice, drawn = random.Random(seed), 0
    plan, eager, exact = fastdiff.compile(KINDS[kind]()), KINDS[kind](), KINDS[kind]()
    exact.to(torch.float64)
    for at in range(calls):
        call = random_call(dice)
        got, single, truth = (result(pipe, call) for pipe in (plan, eager, exact))
        if isinstance(single, str):
            assert got == single, f"seed {seed}, call {at}: {call}"
            continue
        drawn += 1
        verdict = judge("picture", got, single, truth)
        assert verdict.passed, f"seed {seed}, call {at}: {call}: {verdict}"
    assert loop_of(plan).planned >= 0.4 * drawn, loop_of(plan)
