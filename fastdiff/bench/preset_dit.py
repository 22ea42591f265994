"""DiT-XL/2, PixArt-α-XL/2 and PixArt-Σ-XL/2 with their published sizes: 28 layers of 16 heads.

Scaling keeps the layers and the heads' width of 72, and removes heads; the picture shrinks as well.
PixArt's pipelines have no T5: their embeddings are arguments of the call.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from fastdiff.bench.preset_parts import made, random, side_of, vae_config

HEADS, HEAD, PATCH, CHANNELS, T5_WIDTH = 16, 72, 2, 4, 4096


@dataclass(frozen=True)
class DiTPreset:
    """An architecture at scale 1."""

    side: int
    """The latents' side."""
    pipe: Any = DiTPipeline
    """The class that draws with it."""
    pixart: bool = False
    """Whether it attends to a text of T5-XXL."""
    sized: bool = False
    """Whether it takes the picture's size, as the largest PixArt-α does."""
    base_scale: float = 1.0

    upcasts = (False,)

    def network(self, scale: float) -> tuple[Any, dict[str, Any]]:
        heads, side = max(1, round(HEADS * scale)), side_of(self.side, scale)
        config = {
            "sample_size": side,
            "num_layers": 28,
            "num_attention_heads": heads,
            "attention_head_dim": HEAD,
            "patch_size": PATCH,
            "in_channels": CHANNELS,
            "out_channels": 2 * CHANNELS,
        }
        if not self.pixart:
            return DiTTransformer2DModel, config
        return PixArtTransformer2DModel, config | {
            "cross_attention_dim": HEAD * heads,
            "caption_channels": T5_WIDTH,
            "interpolation_scale": 2,
            # the pipeline passes the size to no other
            "use_additional_conditions": self.sized and side == self.side,
        }

    def autoencoder(self, scale: float) -> dict[str, Any]:
        sigma = self.pixart and not self.sized
        return vae_config(scale, scaling_factor=0.13025 if sigma else 0.18215)

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        cls, config = self.network(scale)
        net = random(cls, config, dtype, device, seed)
        positions = made(cls, **config | {"num_layers": 1}).pos_embed.pos_embed
        net.pos_embed.pos_embed.copy_(positions)
        texts = {"tokenizer": None, "text_encoder": None} if self.pixart else {}
        scheduler = made(DDIMScheduler, clip_sample=False)
        if self.pixart:
            scheduler = made(DPMSolverMultistepScheduler)
        return made(
            self.pipe,
            transformer=net,
            vae=random(AutoencoderKL, self.autoencoder(scale), dtype, device, seed + 1),
            scheduler=scheduler,
            **texts,
        )


DIT_256, DIT_512 = DiTPreset(32), DiTPreset(64)
PIXART_ALPHA = DiTPreset(128, PixArtAlphaPipeline, pixart=True, sized=True)
PIXART_SIGMA = DiTPreset(128, PixArtSigmaPipeline, pixart=True)
