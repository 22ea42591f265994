"""Random calls, one after another, of pipelines that draw pixels, use a VQ autoencoder or have
several loops: in float64, each against the same call of the eager pipeline."""

import random

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from peft import LoraConfig
from small import IF, KANDINSKY22, SIMPLE, TINY, noisy
from unclip import unclip_parts

import fastdiff
from fastdiff.compiler.pipelines import loop_of

THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
LEARNED = {"variance_type": "learned_range"}
SCHEDULERS = {
    "DDPM": DDPMScheduler,
    "DDPM, v": lambda: DDPMScheduler(prediction_type="v_prediction", clip_sample=False),
    "DDIM": lambda: DDIMScheduler(clip_sample=False),
    "DDIM, thresholds": lambda: DDIMScheduler(**THRESHOLD),
    "PNDM": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "consistency": diffusers.CMStochasticIterativeScheduler,
    "learned": lambda: DDPMScheduler(**LEARNED),
    "learned, thresholds": lambda: DDPMScheduler(**LEARNED, **THRESHOLD),
}
"""These schedulers compute in the dtype of their samples."""
UNLEARNED = ("DDPM", "DDPM, v", "DDIM", "DDIM, thresholds")
ANY = (*UNLEARNED, "learned", "learned, thresholds")
PIXELS = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
TOLD = {name: IF[name] for name in ("encoder_hid_dim_type", "encoder_hid_dim")}
"""Without the pooled text, which diffusers computes in float32."""
LEVELS = {
    "block_out_channels": (16, 32),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
}


def codes(**config):
    """A VQ autoencoder; a latent is 2×2 pixels."""
    blocks = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return noisy(VQModel(**blocks | {"norm_num_groups": 8, "num_vq_embeddings": 16} | config))


def adapted(net):
    """The network with LoRA adapters "one" and "two"."""
    for name, rank in (("one", 2), ("two", 4)):
        layers = ["to_q", "to_v", "to_out.0", "conv1"]
        net.add_adapter(LoraConfig(r=rank, target_modules=layers, init_lora_weights=False), name)
    return noisy(net)


def random_call(dice):
    return {
        "seed": dice.randrange(2**31),
        "steps": dice.randint(1, 4),
        "count": dice.choice([1, 2, 3]),
        "images": dice.choice([1, 2]),
        "generator": dice.choice(["one", "list", "none"]),
        "guidance_scale": dice.choice([0.0, 0.5, 1.0, 4.0]),
        "eta": dice.choice([0.0, 0.7]),
        "side": dice.choice([8, 16]),
        "adapters": dice.choice([{}, {"one": 1.0}, {"two": 0.5}, {"one": 0.7, "two": -0.4}]),
    }


class Family:
    """make(): a pipeline; call(pipe, c): its result with the random options `c`."""

    def __init__(self, make, call, schedulers):
        self.make, self.call, self.schedulers = make, call, schedulers

    def draw(self, pipe, c):
        torch.manual_seed(c["seed"])  # some schedulers and random class labels use the global one
        if self.schedulers:
            pipe.scheduler = SCHEDULERS[c["scheduler"]]()
        net = getattr(pipe, "unet", None)
        if hasattr(net, "peft_config"):
            net.enable_adapters() if c["adapters"] else net.disable_adapters()
        if hasattr(net, "peft_config") and c["adapters"]:
            net.set_adapters(list(c["adapters"]), weights=list(c["adapters"].values()))
        made = self.call(pipe, c)
        images = made.images if hasattr(made, "images") else made[0]
        return np.asarray([np.asarray(one, dtype="float64") for one in images])


def generator(c, count):
    many = [torch.Generator().manual_seed(c["seed"] + i) for i in range(count)]
    return {"none": None, "one": many[0], "list": many}[c["generator"]]


def noise(c, *shape):
    drawn = torch.Generator().manual_seed(c["seed"] + len(shape))
    return torch.randn(*shape, generator=drawn, dtype=torch.float64)


def unconditional(pipe, c):
    more = {"eta": c["eta"]} if isinstance(pipe, diffusers.DDIMPipeline) else {}
    count = c["count"]
    return pipe(
        batch_size=count,
        generator=generator(c, count),
        num_inference_steps=c["steps"],
        output_type="np",
        **more,
    )


def from_a_text(pipe, c):
    prompts = ["red heart", "a blue star moon"][: c["images"]]
    return pipe(
        prompts,
        height=8 * c["side"],
        width=64,
        num_inference_steps=c["steps"],
        guidance_scale=c["guidance_scale"],
        eta=c["eta"],
        generator=generator(c, len(prompts)),
        output_type="np",
    )


def enlarged(pipe, c):
    return pipe(
        noise(c, c["count"], 3, c["side"], 8).tanh(),
        batch_size=c["count"],
        num_inference_steps=c["steps"],
        eta=c["eta"],
        generator=generator(c, c["count"]),
        output_type="np",
    )


def deepfloyd(cls, pipe, c):
    side, texts = c["side"], c["images"]
    given = {"prompt_embeds": noise(c, texts, 5, 24), "height": side, "width": 8}
    if "Inpainting" in cls:
        del given["height"], given["width"]
        given |= {"image": noise(c, texts, 3, 4, side).tanh(), "strength": 0.7}
        given["original_image"] = noise(c, texts, 3, 8, 2 * side).tanh()
        given["mask_image"] = (noise(c, 1, 1, 8, 2 * side) > 0).double()
    return pipe(
        **given,
        negative_prompt_embeds=-given["prompt_embeds"],
        num_inference_steps=c["steps"] + 1,
        guidance_scale=c["guidance_scale"],
        eta=c["eta"],
        num_images_per_prompt=c["count"],
        generator=generator(c, texts * c["count"]),
        output_type="pt",
    )


def make_deepfloyd(cls):
    second = "SuperResolution" in cls
    more = {"in_channels": 6, "class_embed_type": "timestep"} if second else {"in_channels": 3}
    net = adapted(UNet2DConditionModel(**SIMPLE | TOLD | {"out_channels": 6} | more))
    noising = {"image_noising_scheduler": DDPMScheduler()} if second else {}
    absent = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor"))
    absent |= {"watermarker": None, "requires_safety_checker": False}
    return getattr(diffusers, cls)(**absent, **noising, unet=net, scheduler=DDPMScheduler())


def make_kandinsky(cls):
    config = SIMPLE | KANDINSKY22 | LEVELS | {"out_channels": 8}
    config |= {"in_channels": 9} if "Inpaint" in cls else {}
    more = {"norm_type": "spatial", "latent_channels": 4, "vq_embed_dim": 4}
    movq = codes(**more, block_out_channels=(32, 32))  # its norms have 32 groups
    net = adapted(UNet2DConditionModel(**config))
    return getattr(diffusers, cls)(unet=net, scheduler=DDPMScheduler(), movq=movq)


def from_embeddings(cls, pipe, c):
    texts = c["count"] if cls == "KandinskyV22Pipeline" else 1
    images = c["images"] if c["guidance_scale"] > 1 else 1  # diffusers repeats only with guidance
    given = (
        {}
        if texts > 1 or cls == "KandinskyV22Pipeline"
        else {"image": noise(c, 1, 3, 16, 16).tanh()}
    )
    if "Inpaint" in cls:
        given["mask_image"] = (noise(c, 1, 1, 16, 16) > 0).double()
    return pipe(
        image_embeds=noise(c, texts, 20),
        negative_image_embeds=-noise(c, texts, 20),
        height=16,
        width=16 if given else 2 * c["side"],
        num_inference_steps=c["steps"] + 1,
        guidance_scale=c["guidance_scale"],
        num_images_per_prompt=images,
        generator=generator(c, texts * images),
        output_type="pt",
        **given,
    )


def three_loops(pipe, c):
    prompts = ["red heart", "a blue star moon"][: c["images"]]
    return pipe(
        prompts,
        num_images_per_prompt=c["count"],
        prior_num_inference_steps=c["steps"] + 1,
        decoder_num_inference_steps=3,
        super_res_num_inference_steps=2,
        prior_guidance_scale=c["guidance_scale"],
        decoder_guidance_scale=4.0 - c["guidance_scale"],
        generator=generator(c, len(prompts) * c["count"]),
        output_type="np",
    )


def make_pixels(cls):
    return getattr(diffusers, cls)(noisy(UNet2DModel(**PIXELS)), DDPMScheduler())


def make_consistency(cls):
    net = UNet2DModel(**PIXELS, num_class_embeds=10, resnet_time_scale_shift="scale_shift")
    return getattr(diffusers, cls)(noisy(net), diffusers.CMStochasticIterativeScheduler())


def make_ldm(tokenizer):
    sizes = {"d_model": 24, "encoder_ffn_dim": 48, "head_dim": 12, "encoder_layers": 1}
    heads = {"vocab_size": len(tokenizer), "encoder_attention_heads": 2}
    bert = noisy(LDMBertModel(LDMBertConfig(**sizes, **heads)))
    net, vqvae = adapted(UNet2DConditionModel(**TINY)), codes(latent_channels=4)
    return diffusers.LDMTextToImagePipeline(vqvae, bert, tokenizer, net, DDIMScheduler())


def make_upscaler(cls):
    net = noisy(UNet2DModel(**PIXELS | {"in_channels": 6}))
    return getattr(diffusers, cls)(codes(), net, DDIMScheduler())


@pytest.fixture
def families(tokenizer):
    def of(cls, make, call, schedulers):
        return Family(lambda: make(cls), lambda pipe, c: call(cls, pipe, c), schedulers)

    def simple(cls, make, call, schedulers):
        return Family(lambda: make(cls), call, schedulers)

    masked, inpaint = "IFInpaintingSuperResolutionPipeline", "KandinskyV22InpaintPipeline"
    thresholds = ANY[-4:]
    return {
        "DDPM": simple("DDPMPipeline", make_pixels, unconditional, ("DDPM", "DDPM, v", "PNDM")),
        "DDIM": simple("DDIMPipeline", make_pixels, unconditional, ANY[2:4]),
        "consistency": simple(
            "ConsistencyModelPipeline", make_consistency, unconditional, ("consistency",)
        ),
        "LDM": Family(lambda: make_ldm(tokenizer), from_a_text, UNLEARNED),
        "LDM, enlarging": simple("LDMSuperResolutionPipeline", make_upscaler, enlarged, UNLEARNED),
        "IF": of("IFPipeline", make_deepfloyd, deepfloyd, thresholds),
        "IF, masked": of(masked, make_deepfloyd, deepfloyd, thresholds),
        "Kandinsky": of("KandinskyV22Pipeline", make_kandinsky, from_embeddings, ANY),
        "Kandinsky, masked": of(inpaint, make_kandinsky, from_embeddings, ANY),
        "unCLIP": Family(
            lambda: diffusers.UnCLIPPipeline(**unclip_parts(tokenizer)), three_loops, ()
        ),
    }


@pytest.mark.filterwarnings("ignore:The `scale_model_input` function:UserWarning")
@pytest.mark.parametrize("calls", [2, pytest.param(40, marks=pytest.mark.product)])
@pytest.mark.parametrize(
    "name",
    [
        *("DDPM", "DDIM", "consistency", "LDM", "LDM, enlarging", "IF", "IF, masked"),
        *("Kandinsky", "Kandinsky, masked", "unCLIP"),
    ],
)
@torch.no_grad()
def test_random_calls(name, calls, families):
    """If diffusers raises, the compiled pipeline raises the same kind of error."""
    family, seed = families[name], 20261129
    dice = random.Random(f"{name} {seed}")
    plan, eager = (family.make().to(torch.float64) for _ in range(2))
    fastdiff.compile(plan)
    for pipe in (plan, eager):
        pipe.set_progress_bar_config(disable=True)
    raised = 0
    for at in range(calls):
        call = random_call(dice) | {"scheduler": dice.choice(family.schedulers or [""])}
        try:
            want = family.draw(eager, call)
        except (TypeError, RuntimeError, ValueError, AttributeError) as error:
            raised += 1
            with pytest.raises(type(error)):
                family.draw(plan, call)
            continue
        got = family.draw(plan, call)
        off = abs(got - want).max() / max(1.0, abs(want).max())
        # adapters are merged in float32
        adapted_in_float32 = call["adapters"] and hasattr(plan, "unet")
        assert off <= (1e-4 if adapted_in_float32 else 1e-8), f"{name}, call {at}: {call}: {off}"
    whole, loop = 3 if name == "unCLIP" else 1, loop_of(plan)
    # diffusers' loop runs if a scheduler ignores the variance that the network learned
    ignored = loop.own["the scheduler is given a variance and does not read it"]
    assert loop.planned + ignored >= whole * (calls - raised), loop.own
    assert raised <= calls / 2
