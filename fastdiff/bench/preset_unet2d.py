"""U-Nets that draw pixels without a text: DDPM's and a consistency model's.

Scaling keeps the block structure and removes channels, 32 at a time, or whole heads of 64; the
picture shrinks as well, but stays a multiple of what the U-Net halves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMPipeline,
    DDPMScheduler,
    UNet2DModel,
)

from fastdiff.bench.preset_parts import made, random

CLASSES = 1000


@dataclass(frozen=True)
class UNet2DPreset:
    """An architecture at scale 1. `unit`: the channels that scaling removes at a time."""

    side: int
    channels: tuple[int, ...]
    unit: int
    attention: tuple[bool, ...]
    """Whether each down block has attention."""
    layers: int
    config: Mapping[str, Any] = field(default_factory=dict)
    """What else differs from diffusers' defaults."""
    consistency: bool = False
    """Whether it is ADM, run as a consistency model, instead of DDPM's U-Net."""
    base_scale: float = 1.0

    upcasts = (False,)

    def network(self, scale: float) -> tuple[Any, dict[str, Any]]:
        whole = self.channels[0] // self.unit
        units = max(1, round(whole * scale))
        channels = [c * units // whole for c in self.channels]
        multiple = 2 ** (len(channels) - 1)
        plain = "Resnet{}sampleBlock2D" if self.consistency else "{}Block2D"
        down = ["AttnDownBlock2D" if a else plain.format("Down") for a in self.attention]
        up = ["AttnUpBlock2D" if a else plain.format("Up") for a in self.attention[::-1]]
        # at least four channels each, as at scale 1: a norm of two numbers is all or nothing
        groups = [g for g in range(1, 33) if gcd(*channels) % (4 * g) == 0]
        return UNet2DModel, {
            "sample_size": max(multiple, multiple * round(self.side * scale / multiple)),
            "block_out_channels": channels,
            "down_block_types": down,
            "up_block_types": up,
            "layers_per_block": self.layers,
            "norm_num_groups": max(groups),
            **self.config,
        }

    def autoencoder(self, scale: float) -> None:
        """It has none: it draws pixels."""

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        unet = random(*self.network(scale), dtype, device, seed)
        if not self.consistency:
            return made(DDPMPipeline, unet=unet, scheduler=made(DDPMScheduler))
        return made(
            ConsistencyModelPipeline, unet=unet, scheduler=made(CMStochasticIterativeScheduler)
        )


_DDPM = {
    "attention_head_dim": None,  # one head
    "downsample_padding": 0,
    "norm_eps": 1e-6,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
}
DDPM_CIFAR = UNet2DPreset(
    side=32,
    channels=(128, 256, 256, 256),
    unit=32,
    attention=(False, True, False, False),
    layers=2,
    config=_DDPM,
)
DDPM_256 = UNet2DPreset(
    side=256,
    channels=(128, 128, 256, 256, 512, 512),
    unit=32,
    attention=(False, False, False, False, True, False),
    layers=2,
    config=_DDPM,
)
CONSISTENCY_64 = UNet2DPreset(
    side=64,
    channels=(192, 384, 576, 768),
    unit=64,
    attention=(False, True, True, True),
    layers=3,
    config={
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attention_head_dim": 64,
        "attn_norm_num_groups": 32,
        "num_class_embeds": CLASSES,
    },
    consistency=True,
)
