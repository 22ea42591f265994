"""Z-Image and Qwen-Image with their published sizes, whose launches are counted.

Scaling keeps the blocks and the heads' width of 128, and removes heads; the picture shrinks, too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel, ZImageTransformer2DModel

from fastdiff.bench.preset_parts import side_of, vae_config
from fastdiff.errors import UserError

HEAD = 128


@dataclass(frozen=True)
class CountedPreset:
    """An architecture at scale 1. `latents`: their side; `heads`: how many."""

    name: str
    heads: int
    latents: int = 128
    base_scale: float = 1.0

    upcasts = (False,)

    def side(self, scale: float) -> int:
        return side_of(self.latents, scale)

    def network(self, scale: float) -> tuple[Any, dict[str, Any]]:
        heads = max(1, round(self.heads * scale))
        if self.name == "Qwen-Image":
            return QwenImageTransformer2DModel, {
                "in_channels": 64,
                "out_channels": 16,
                "num_layers": 60,
                "attention_head_dim": HEAD,
                "num_attention_heads": heads,
                "joint_attention_dim": 3584,
                "axes_dims_rope": (16, 56, 56),
            }
        return ZImageTransformer2DModel, {
            "in_channels": 16,
            "dim": HEAD * heads,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": heads,
            "n_kv_heads": heads,
            "cap_feat_dim": 2560,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
        }

    def autoencoder(self, scale: float) -> dict[str, Any] | None:
        if self.name == "Qwen-Image":
            return None  # of another class, for videos, which fastdiff does not compute
        return vae_config(scale, scaling_factor=0.3611) | {
            "latent_channels": 16,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        raise UserError(f"the preset of {self.name} can only be counted; use fastdiff graph")


Z_IMAGE = CountedPreset("Z-Image", heads=30)
QWEN_IMAGE = CountedPreset("Qwen-Image", heads=24)
