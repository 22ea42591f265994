"""FLUX.1-dev with its published sizes: 19 blocks of two streams and 38 of one, 24 heads.

Scaling keeps the blocks and the heads' width of 128, and removes heads; the picture shrinks, too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from fastdiff.bench.preset_parts import side_of, vae_config
from fastdiff.errors import UserError

HEADS, HEAD, AXES, PACKED, CHANNELS = 24, 128, (16, 56, 56), 4, 16
"""`PACKED`: latents of a token."""


@dataclass(frozen=True)
class FluxPreset:
    """The architecture at scale 1. `latents`: their side."""

    latents: int
    base_scale: float = 1.0

    upcasts = (False,)

    def side(self, scale: float) -> int:
        return side_of(self.latents, scale)

    def network(self, scale: float) -> tuple[Any, dict[str, Any]]:
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

    def autoencoder(self, scale: float) -> dict[str, Any]:
        return vae_config(scale, scaling_factor=0.3611) | {
            "latent_channels": CHANNELS,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        raise UserError("the preset of FLUX is only counted: give it to graph")


FLUX = FluxPreset(128)
