"""Stable Diffusion 1.5, 2.1 and XL, whose networks are U-Nets.

Scaling keeps the block structure and the heads' widths, and removes heads: SD1.5 at 1/4 has 2 heads
of 40, 80 and 160 instead of 8, and a picture of a quarter of the height and width.
"""

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from fastdiff.bench.preset_parts import (
    CLIP_G,
    CLIP_L,
    Text,
    clip,
    clip_tokenizer,
    made,
    random,
    scaled_texts,
    side_of,
    vae_config,
)

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
XL_TIME_IDS, XL_TIME_WIDTH = 6, 256


@dataclass(frozen=True)
class UNetPreset:
    """An architecture at scale 1. `unit`: the width of a head in the first block."""

    channels: tuple[int, ...]
    heads: tuple[int, ...]
    unit: int
    attention: tuple[bool, ...]  # of each down block
    depth: tuple[int, ...]  # transformer layers of each block
    texts: tuple[Text, ...]
    latent_size: int
    scaling_factor: float
    linear_projection: bool = True
    v_prediction: bool = False
    base_scale: float = 1.0

    @property
    def xl(self) -> bool:
        return len(self.texts) == 2

    @property
    def upcasts(self) -> tuple[bool, ...]:
        return (False, True) if self.xl else (False,)

    def network(self, scale: float) -> tuple[Any, dict[str, Any]]:
        whole = self.channels[0] // self.unit
        units = max(1, round(whole * scale))
        channels = [c * units // whole for c in self.channels]
        down = ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in self.attention]
        up = ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in self.attention[::-1]]
        divisor, texts = gcd(*channels), scaled_texts(self.texts, scale)
        config: dict[str, Any] = {
            "sample_size": side_of(self.latent_size, scale),
            "block_out_channels": channels,
            "down_block_types": down,
            "up_block_types": up,
            # diffusers means the number of heads
            "attention_head_dim": [h * units // whole for h in self.heads],
            "transformer_layers_per_block": list(self.depth),
            "cross_attention_dim": sum(text.width for text in texts),
            "use_linear_projection": self.linear_projection,
            "norm_num_groups": max(g for g in range(1, 33) if divisor % g == 0),
        }
        if self.xl:
            config |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": XL_TIME_WIDTH,
                "projection_class_embeddings_input_dim": texts[1].width
                + XL_TIME_IDS * XL_TIME_WIDTH,
            }
        return UNet2DConditionModel, config

    def autoencoder(self, scale: float) -> dict[str, Any]:
        return vae_config(scale, self.scaling_factor)

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        tokenizer = clip_tokenizer()
        encoders = [
            clip(text, tokenizer, projection=i == 1).to(device, dtype)
            for i, text in enumerate(scaled_texts(self.texts, scale))
        ]
        shared = {
            "unet": random(*self.network(scale), dtype, device, seed),
            "vae": random(AutoencoderKL, self.autoencoder(scale), dtype, device, seed + 1),
            "text_encoder": encoders[0],
            "tokenizer": tokenizer,
        }
        if self.xl:
            return made(
                StableDiffusionXLPipeline,
                **shared,
                text_encoder_2=encoders[1],
                tokenizer_2=tokenizer,
                scheduler=made(
                    EulerDiscreteScheduler, **SCHEDULE, timestep_spacing="leading", steps_offset=1
                ),
                add_watermarker=False,
            )
        # DDIM, not SD1.5's own PNDM, which calls the U-Net one more time than there are steps
        scheduler = made(
            DDIMScheduler,
            **SCHEDULE,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction" if self.v_prediction else "epsilon",
        )
        return made(
            StableDiffusionPipeline,
            **shared,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


SD15 = UNetPreset(
    channels=(320, 640, 1280, 1280),
    heads=(8, 8, 8, 8),
    unit=40,
    attention=(True, True, True, False),
    depth=(1, 1, 1, 1),
    texts=(CLIP_L,),
    latent_size=64,
    scaling_factor=0.18215,
    linear_projection=False,
)
SD21 = replace(
    SD15,
    heads=(5, 10, 20, 20),
    unit=64,
    texts=(Text(1024, 23, "gelu"),),
    latent_size=96,
    linear_projection=True,
    v_prediction=True,
)
SDXL = UNetPreset(
    channels=(320, 640, 1280),
    heads=(5, 10, 20),
    unit=64,
    attention=(False, True, True),
    depth=(1, 2, 10),
    texts=(CLIP_L, CLIP_G),
    latent_size=128,
    scaling_factor=0.13025,
)
TINY = replace(SD15, base_scale=0.25)
