"""Latent diffusion's text model, and Stable Diffusion's upscaler by four; their U-Nets.

The sizes are from memory of CompVis/ldm-text2im-large-256 and stabilityai/
stable-diffusion-x4-upscaler.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    LDMTextToImagePipeline,
    StableDiffusionUpscalePipeline,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)

from fastdiff.bench.preset_parts import (
    HEAD,
    Text,
    clip,
    clip_tokenizer,
    heads_of,
    made,
    random,
    scaled_texts,
)
from fastdiff.bench.preset_unet import SCHEDULE, UNetPreset

LATENTS, PIXELS = 4, 3
NOISE_LEVELS = 1000


@dataclass(frozen=True)
class UpscalePreset(UNetPreset):
    """Latents beside a picture of their size, which becomes four times as large."""

    upcasts = (True,)

    def network(self, scale: float) -> tuple[Any, dict[str, Any]]:
        cls, config = super().network(scale)
        return cls, config | {
            "in_channels": LATENTS + PIXELS,
            "num_class_embeds": NOISE_LEVELS,
            "only_cross_attention": [True, True, True, False],
        }

    def autoencoder(self, scale: float) -> dict[str, Any]:
        config = super().autoencoder(scale)
        widths = config["block_out_channels"][:-1]
        kinds = {name: config[name][:-1] for name in ("down_block_types", "up_block_types")}
        return config | kinds | {"block_out_channels": widths, "force_upcast": True}

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        tokenizer = clip_tokenizer()
        (text,) = scaled_texts(self.texts, scale)
        return made(
            StableDiffusionUpscalePipeline,
            unet=random(*self.network(scale), dtype, device, seed),
            vae=random(AutoencoderKL, self.autoencoder(scale), dtype, device, seed + 1),
            text_encoder=clip(text, tokenizer, projection=False).to(device, dtype),
            tokenizer=tokenizer,
            low_res_scheduler=made(DDPMScheduler, beta_schedule="scaled_linear"),
            scheduler=made(
                DDIMScheduler,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                prediction_type="v_prediction",
            ),
        )


@dataclass(frozen=True)
class LatentPreset(UNetPreset):
    """Latent diffusion, whose text encoder is its own BERT."""

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        tokenizer = clip_tokenizer()
        (text,) = scaled_texts(self.texts, scale)
        config = LDMBertConfig(
            vocab_size=len(tokenizer),
            d_model=text.width,
            encoder_ffn_dim=4 * text.width,
            encoder_layers=text.layers,
            encoder_attention_heads=heads_of(text.width * 0.4),
            head_dim=HEAD,
        )
        bert = made(LDMBertModel, config=config).eval()
        return made(
            LDMTextToImagePipeline,
            unet=random(*self.network(scale), dtype, device, seed),
            vqvae=random(AutoencoderKL, self.autoencoder(scale), dtype, device, seed + 1),
            bert=bert.to(device, dtype),
            tokenizer=tokenizer,
            scheduler=made(DDIMScheduler, **SCHEDULE, clip_sample=False, steps_offset=1),
        )


X4 = UpscalePreset(
    channels=(256, 512, 512, 1024),
    heads=(8, 8, 8, 8),
    unit=32,
    attention=(False, True, True, True),
    depth=(1, 1, 1, 1),
    texts=(Text(1024, 23, "gelu"),),
    latent_size=128,
    scaling_factor=0.08333,
)
LDM = LatentPreset(
    channels=(320, 640, 1280, 1280),
    heads=(8, 8, 8, 8),
    unit=40,
    attention=(True, True, True, False),
    depth=(1, 1, 1, 1),
    texts=(Text(1280, 32, "gelu"),),
    latent_size=32,
    scaling_factor=0.18215,
    linear_projection=False,
)
