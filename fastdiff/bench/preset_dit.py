"""DiT-XL/2 and PixArt-Σ-XL/2 with their published sizes: 28 layers of 16 heads.

Scaling keeps the layers and the heads' width of 72, and removes heads; the picture shrinks as well.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from fastdiff.bench.preset_parts import side_of, vae_config
from fastdiff.errors import UserError

HEADS, HEAD, PATCH, CHANNELS, T5_WIDTH = 16, 72, 2, 4, 4096


@dataclass(frozen=True)
class DiTPreset:
    """An architecture at scale 1. `side`: of its latents; `pixart`: whether it attends to a text of
    T5-XXL."""

    side: int
    pixart: bool = False
    base_scale: float = 1.0

    upcasts = (False,)

    def network(self, scale: float) -> tuple[Any, dict[str, Any]]:
        heads = max(1, round(HEADS * scale))
        config = {
            "sample_size": side_of(self.side, scale),
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
            "use_additional_conditions": False,
        }

    def autoencoder(self, scale: float) -> dict[str, Any]:
        return vae_config(scale, scaling_factor=0.13025 if self.pixart else 0.18215)

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        raise UserError("the presets of DiT and PixArt are only counted: give them to graph")


DIT_256, DIT_512 = DiTPreset(32), DiTPreset(64)
PIXART_SIGMA = DiTPreset(128, pixart=True)
