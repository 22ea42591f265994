"""Fixtures for the tests of compile: a small U-Net, and the components of tiny pipelines."""

import copy
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from small import FLUX, SD3, SD3_KINDS, noisy
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

import fastdiff
from fastdiff.bench.preset_sd3 import t5_tokenizer
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.demo import DEMO_FOLDER
from fastdiff.recipes import denoiser


@pytest.fixture
def small():
    return {
        "block_out_channels": (32, 64),
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }


@pytest.fixture
def unet(small):
    torch.manual_seed(3)
    return UNet2DConditionModel(**small).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return CLIPTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer", model_max_length=77)


@pytest.fixture(scope="session")
def tokenizer_3(tokenizer):
    return t5_tokenizer(tokenizer)


def text_encoder(cls, vocabulary):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32}
    depth = {"num_hidden_layers": 3, "num_attention_heads": 2, "eos_token_id": vocabulary - 1}
    return noisy(cls(CLIPTextConfig(vocab_size=vocabulary, **sizes, **depth)))


@pytest.fixture(scope="session")
def copies():
    """copies(make): a cached `make`, which builds components once for the same arguments and gives
    copies; copying takes a quarter of the time."""

    def of(make):
        kept = {}

        def parts(*args, **more):
            key = repr((args, sorted(more.items())))
            if key not in kept:
                with torch.inference_mode(False):
                    kept[key] = make(*args, **more)
            # tokenizers are slow to copy, and no test changes them
            return {
                name: part if name.startswith("tokenizer") else copy.deepcopy(part)
                for name, part in kept[key].items()
            }

        return parts

    return of


@pytest.fixture(scope="session")
def components(tokenizer, copies):
    """components(xl, dtype, unet={…}): a tiny pipeline's components; a latent is 2×2 pixels."""

    def make(xl=False, dtype=torch.float64, unet=None):
        xl_config = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
        config = {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "attention_head_dim": 4,
            "cross_attention_dim": 64 if xl else 32,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
        vae = AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
            sample_size=16,
            force_upcast=False,  # upcasting would turn float64 into float32, too
        )
        parts = {
            "vae": noisy(vae).to(dtype),
            "text_encoder": text_encoder(CLIPTextModel, len(tokenizer)).to(dtype),
            "tokenizer": tokenizer,
            "unet": noisy(
                UNet2DConditionModel(**(config | (xl_config if xl else {}) | (unet or {})))
            ).to(dtype),
            "scheduler": DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
        }
        if xl:
            second = text_encoder(CLIPTextModelWithProjection, len(tokenizer)).to(dtype)
            return parts | {"text_encoder_2": second, "tokenizer_2": tokenizer}
        return parts | {"safety_checker": None, "feature_extractor": None}

    return copies(make)


@pytest.fixture(scope="session")
def components_sd3(tokenizer, tokenizer_3, copies):
    """components_sd3(kind, t5, dtype, transformer's config): a tiny pipeline's components; a latent
    is 2×2 pixels."""

    def make(kind="sd3", t5=False, dtype=torch.float64, **transformer):
        vae = AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            force_upcast=False,
        )
        config = SD3 | SD3_KINDS[kind] | {"in_channels": 16, "out_channels": 16} | transformer
        parts = {
            "transformer": noisy(SD3Transformer2DModel(**config)).to(dtype),
            "vae": noisy(vae).to(dtype),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
            "text_encoder_3": None,
            "tokenizer_3": None,
        }
        for name in ("", "_2"):
            encoder = text_encoder(CLIPTextModelWithProjection, len(tokenizer)).to(dtype)
            parts |= {f"text_encoder{name}": encoder, f"tokenizer{name}": tokenizer}
        if t5:
            sizes = {"d_model": 72, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
            encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer_3), **sizes))
            parts |= {"text_encoder_3": noisy(encoder).to(dtype), "tokenizer_3": tokenizer_3}
        return parts

    return copies(make)


@pytest.fixture
def controlnet_sd3(shaken):
    """controlnet_sd3(kind, seed): a random ControlNet; the kind "alone" takes no text and has no
    position embedding."""

    def make(kind="sd3", seed=7, **config):
        if kind == "alone":
            config |= {"joint_attention_dim": None, "use_pos_embed": False}
        net = SD3ControlNetModel(**SD3 | {"num_layers": 2} | SD3_KINDS.get(kind, {}) | config)
        return shaken(net, seed)

    return make


FLUX_VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "force_upcast": False,
}


@pytest.fixture(scope="session")
def components_flux(tokenizer, tokenizer_3, copies):
    """components_flux(dtype, transformer's config): a tiny pipeline's components; a token is 4×4
    pixels."""

    def make(dtype=torch.float64, **transformer):
        clip = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 16}
        clip |= {"num_hidden_layers": 1, "num_attention_heads": 2}
        t5 = {"vocab_size": len(tokenizer_3), "d_model": 20, "d_kv": 8, "d_ff": 16}
        t5 |= {"num_layers": 1, "num_heads": 2}
        shifts = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
        config = FLUX | {"guidance_embeds": True} | transformer
        return {
            "scheduler": FlowMatchEulerDiscreteScheduler(**shifts),
            "vae": noisy(AutoencoderKL(**FLUX_VAE)).to(dtype),
            "text_encoder": noisy(CLIPTextModel(CLIPTextConfig(**clip))).to(dtype),
            "tokenizer": tokenizer,
            "text_encoder_2": noisy(T5EncoderModel(T5Config(**t5))).to(dtype),
            "tokenizer_2": tokenizer_3,
            "transformer": noisy(FluxTransformer2DModel(**config)).to(dtype),
        }

    return copies(make)


@pytest.fixture
def hold():
    """hold(pipe, loop, tolerance, **call): compile, draw, and compare with eager diffusers; returns
    the compiled picture.

    `loop` says which loop must have run: "plan", "diffusers" if compile leaves this class's loop
    alone, else part of the reported reason why diffusers' own loop ran. No part may run eagerly.
    """

    def draw(pipe, call):
        # SD3 encodes a ControlNet's picture with noise of the global generator
        torch.manual_seed(9)
        pipe.set_progress_bar_config(disable=True)
        given = {name: copy.deepcopy(value) for name, value in call.items()}
        given.setdefault("generator", torch.Generator().manual_seed(5))
        options = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent"}
        if "prompt_embeds" not in given:
            options["prompt"] = "red heart"
        options = {name: value for name, value in (options | given).items() if value is not None}
        result = pipe(**options)
        return result[0] if isinstance(result, tuple) else result.images

    def run(pipe, loop, tolerance=1e-9, **call):
        want = draw(pipe if slot_of(denoiser(pipe)) is None else copy.deepcopy(pipe), call)
        fastdiff.compile(pipe)
        before = loop_of(pipe)
        planned, own = (before.planned, Counter(before.own)) if before else (0, Counter())
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            got = draw(pipe, call)
        got, want = (np.stack([np.asarray(p, dtype="float64") for p in x]) for x in (got, want))
        assert np.isfinite(want).all()
        assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)
        now = loop_of(pipe)
        assert not any("eagerly" in part.why for part in fastdiff.report(pipe).parts)
        if loop == "plan":
            assert now.planned == planned + 1, now.own
        elif loop == "diffusers":
            assert now is None
        else:
            (reason,) = now.own - own
            assert loop in reason
        return got

    return run


@pytest.fixture
def picture():
    """picture(seed, channels, size): [1, channels, size, size] between 0 and 1, float64."""

    def draw(seed=0, channels=3, size=16):
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(1, channels, size, size, generator=generator, dtype=torch.float64)

    return draw


@pytest.fixture
def mask():
    """[1, 1, 16, 16]: a mask whose left half is to be repainted."""
    return (torch.arange(16) < 8).double().expand(1, 1, 16, 16)


@pytest.fixture
def shaken():
    """shaken(module): adds noise to its weights, so that zero convolutions matter; in float64."""

    def shake(module, seed=7):
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        return module.double().eval()

    return shake


@pytest.fixture
def controlnet(shaken):
    """controlnet(unet, seed): a random ControlNet for this U-Net; a latent is 2×2 pixels."""

    def make(unet, seed=7):
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32))
        return shaken(net, seed)

    return make
