"""AuraFlow with its published sizes: 4 blocks of a picture beside a text, 32 of both together.

Scaling keeps the blocks and the heads' width of 256, and removes heads; the picture shrinks as
well. Its text encoder is one block of UMT5: no part of it is timed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import UMT5Config, UMT5EncoderModel

from fastdiff.bench.preset_parts import (
    HEAD,
    clip_tokenizer,
    heads_of,
    made,
    random,
    side_of,
    vae_config,
)
from fastdiff.bench.preset_sd3 import t5_tokenizer

HEADS, WIDE, PATCH, CHANNELS, TEXT = 12, 256, 2, 4, 2048


@dataclass(frozen=True)
class AuraFlowPreset:
    """An architecture at scale 1. `side`: of its latents."""

    side: int = 128
    blocks: tuple[int, int] = (4, 32)
    """The numbers of blocks: a picture beside a text, and both as one sequence."""
    base_scale: float = 1.0

    upcasts = (False, True)

    def network(self, scale: float) -> tuple[Any, dict[str, Any]]:
        heads = max(1, round(HEADS * scale))
        return AuraFlowTransformer2DModel, {
            "sample_size": side_of(self.side, scale),
            "patch_size": PATCH,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_mmdit_layers": self.blocks[0],
            "num_single_dit_layers": self.blocks[1],
            "attention_head_dim": WIDE,
            "num_attention_heads": heads,
            "joint_attention_dim": HEAD * heads_of(TEXT * scale),
            "caption_projection_dim": WIDE * heads,
            "pos_embed_max_size": 96**2,
        }

    def autoencoder(self, scale: float) -> dict[str, Any]:
        return vae_config(scale, scaling_factor=0.13025)

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        tokenizer, (cls, config) = t5_tokenizer(clip_tokenizer()), self.network(scale)
        width = config["joint_attention_dim"]
        told = UMT5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=HEAD,
            num_heads=width // HEAD,
            d_ff=2 * width,
            num_layers=1,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return made(
            AuraFlowPipeline,
            tokenizer=tokenizer,
            text_encoder=random(UMT5EncoderModel, {"config": told}, dtype, device, seed + 2),
            vae=random(AutoencoderKL, self.autoencoder(scale), dtype, device, seed + 1),
            transformer=random(cls, config, dtype, device, seed),
            scheduler=made(FlowMatchEulerDiscreteScheduler, shift=1.73),
        )


AURAFLOW = AuraFlowPreset()
