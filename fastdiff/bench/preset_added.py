"""The decoders of unCLIP (Karlo) and Kandinsky 2.2, and DeepFloyd IF's first stage: U-Nets whose
pixels attend to a text and to each other at once.

Their configs are from memory of the published `config.json`s; the numbers of parameters agree.
Scaling keeps the block structure and the heads' width of 64, and removes heads: unCLIP's decoder at
a fifth has 1 head in the first block instead of 5.
"""

from dataclasses import dataclass, field
from typing import Any

from diffusers import UNet2DConditionModel

from fastdiff.bench.preset_parts import HEAD, heads_of, side_of
from fastdiff.errors import UserError

LEVELS = 4


@dataclass(frozen=True)
class AddedPreset:
    """An architecture at scale 1. Widths that depend on the scale are multiples of a head's."""

    name: str
    heads: int
    """In the first block; the others have two, three and four times as many."""
    channels: int
    """Of its latents, or of its picture."""
    text: int
    """Columns of what the pixels attend to."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further settings, the same at every scale."""
    told: int = 0
    """Columns of what it is told, if that is projected to `text`."""
    pools: bool = False
    """Whether an attention with heads of 64 pools the text."""
    side: int = 64
    base_scale: float = 1.0

    upcasts = (False,)

    def network(self, scale: float) -> tuple[Any, dict[str, Any]]:
        heads = max(1, round(self.heads * scale))
        told = HEAD * heads_of(self.told * scale) if self.told else None
        config = {
            "sample_size": side_of(self.side, scale),
            "in_channels": self.channels,
            "out_channels": 2 * self.channels,
            "block_out_channels": [HEAD * heads * level for level in range(1, LEVELS + 1)],
            "layers_per_block": 3,
            "attention_head_dim": HEAD,  # here diffusers means the width of a head
            "cross_attention_dim": HEAD * heads_of(self.text * scale),
            "encoder_hid_dim": told,
            "resnet_time_scale_shift": "scale_shift",
            "down_block_types": [
                "ResnetDownsampleBlock2D",
                *["SimpleCrossAttnDownBlock2D"] * (LEVELS - 1),
            ],
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": [
                *["SimpleCrossAttnUpBlock2D"] * (LEVELS - 1),
                "ResnetUpsampleBlock2D",
            ],
        }
        if self.pools and told is not None:
            config["addition_embed_type_num_heads"] = told // HEAD
        return UNet2DConditionModel, config | self.more

    def autoencoder(self, scale: float) -> None:
        """It has none: Kandinsky's is a VQModel, the others draw pixels."""

    def pipeline(self, scale: float, dtype: Any, device: str, seed: int) -> Any:
        raise UserError(f"the preset {self.name} is a network alone: count it with fastdiff graph")


UNCLIP = AddedPreset(
    "unclip", heads=5, channels=3, text=1536, more={"class_embed_type": "identity"}
)
KANDINSKY22 = AddedPreset(
    "kandinsky22",
    heads=6,
    channels=4,
    text=768,
    told=1280,
    more={"encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"},
)
IF = AddedPreset(
    "if",
    heads=11,
    channels=3,
    text=2816,
    told=4096,
    pools=True,
    more={
        "act_fn": "gelu",
        "time_embedding_act_fn": "gelu",
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text",
        "cross_attention_norm": "group_norm",
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 2**0.5,
        "mid_block_scale_factor": 2**0.5,
    },
)
