"""FLUX.1-dev and FLUX.2-dev with their published sizes: 19 blocks of two streams and 38 of one, 24
heads; 8 and 48, 48 heads.

Scaling keeps the blocks and the heads' width of 128, and removes heads; the picture shrinks, too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)

from fastdiff.bench.preset_parts import made, random, side_of, vae_config
from fastdiff.errors import UserError

HEADS, HEADS_2, HEAD, AXES, PACKED, CHANNELS = 24, 48, 128, (16, 56, 56), 4, 16
"""`PACKED`: latents of a token."""


@dataclass(frozen=True)
class FluxPreset:
    """An architecture at scale 1. `latents`: their side; `second`: whether it is FLUX.2's."""

    latents: int
    second: bool = False
    base_scale: float = 1.0

    upcasts = (False,)

    def side(self, scale: float) -> int:
        return side_of(self.latents, scale)

    def network(self, scale: float) -> tuple[Any, dict[str, Any]]:
        if self.second:
            heads = max(1, round(HEADS_2 * scale))
            return Flux2Transformer2DModel, {"num_attention_heads": heads}
        return FluxTransformer2DModel, {
            "in_channels": CHANNELS * PACKED,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": HEAD,
            "num_attention_heads": max(1, round(HEADS * scale)),
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": AXES,
        }

    def autoencoder(self, scale: float) -> dict[str, Any] | None:
        if self.second:  # another class
            return None
        return vae_config(scale, scaling_factor=0.3611) | {
            "latent_channels": CHANNELS,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        """Without text encoders: its embeddings are arguments of the call."""
        if (vae := self.autoencoder(scale)) is None:
            raise UserError("the preset flux2 can only be counted; use fastdiff graph")
        absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        pipe = made(
            FluxPipeline,
            scheduler=made(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
            vae=random(AutoencoderKL, vae, dtype, device, seed + 1),
            transformer=random(*self.network(scale), dtype, device, seed),
            **dict.fromkeys(absent),
        )
        pipe.default_sample_size = self.side(scale)
        return pipe


FLUX, FLUX2 = FluxPreset(128), FluxPreset(128, second=True)
