"""DiT-XL/2 with its published sizes: 28 layers of 16 heads, pictures of 256×256 and 512×512.

Scaling keeps the layers and the heads' width of 72, and removes heads; the picture shrinks as well.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from fastdiff.bench.preset_parts import side_of, vae_config
from fastdiff.errors import UserError

HEADS, HEAD, PATCH, CHANNELS = 16, 72, 2, 4


@dataclass(frozen=True)
class DiTPreset:
    """An architecture at scale 1. `side`: of its latents."""

    side: int
    base_scale: float = 1.0

    upcasts = (False,)

    def network(self, scale: float) -> tuple[Any, dict[str, Any]]:
        return DiTTransformer2DModel, {
            "sample_size": side_of(self.side, scale),
            "num_layers": 28,
            "num_attention_heads": max(1, round(HEADS * scale)),
            "attention_head_dim": HEAD,
            "patch_size": PATCH,
            "in_channels": CHANNELS,
            "out_channels": 2 * CHANNELS,
        }

    def autoencoder(self, scale: float) -> dict[str, Any]:
        return vae_config(scale, scaling_factor=0.18215)

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        raise UserError("the presets dit-256 and dit-512 are only counted: give them to graph")


DIT_256, DIT_512 = DiTPreset(32), DiTPreset(64)
