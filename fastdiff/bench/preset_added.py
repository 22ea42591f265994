"""The decoders of unCLIP (Karlo) and Kandinsky 2.2, and DeepFloyd IF's first stage: U-Nets whose
pixels attend to a text and to each other at once.

Their configs are from memory of the published `config.json`s; the numbers of parameters agree.
Scaling keeps the block structure and the heads' width of 64, and removes heads: unCLIP's decoder at
a fifth has 1 head in the first block instead of 5.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    IFPipeline,
    KandinskyV22Pipeline,
    UnCLIPImageVariationPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

from fastdiff.bench.preset_parts import (
    HEAD,
    Text,
    clip,
    clip_tokenizer,
    heads_of,
    made,
    random,
    side_of,
)

LEVELS = 4
ENLARGING = {
    "block_out_channels": (32, 32),
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "in_channels": 6,
    "out_channels": 3,
    "layers_per_block": 1,
    "add_attention": False,
}


@dataclass(frozen=True)
class AddedPreset:
    """An architecture at scale 1. Widths that depend on the scale are multiples of a head's."""

    make: Callable[[Any, float, torch.dtype, str, int], Any]
    """(its network, scale, dtype, device, seed) -> the pipeline."""
    heads: int
    """In the first block; the others have two, three and four times as many."""
    channels: int
    """Channels of its latents, or of its picture."""
    text: int
    """Columns of what the pixels attend to."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further settings, the same at every scale."""
    told: int = 0
    """Columns of its embedding, if that is projected to `text`."""
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

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        net = random(*self.network(scale), dtype, device, seed)
        return self.make(net, scale, dtype, device, seed)


def _unclip(net: Any, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
    """Variations of a picture, whose embedding is given. The parts that enlarge are tiny and keep
    the size, because only the decoder's loop is measured."""
    config, tokenizer = net.config, clip_tokenizer()
    encoder = clip(Text(HEAD, 1, "gelu"), tokenizer, projection=True).to(device, dtype)
    sizes = {
        "clip_embeddings_dim": HEAD,
        "time_embed_dim": 4 * config.block_out_channels[0],
        "cross_attention_dim": config.cross_attention_dim,
    }
    small = ENLARGING | {"sample_size": config.sample_size}
    return made(
        UnCLIPImageVariationPipeline,
        decoder=net,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_proj=random(UnCLIPTextProjModel, sizes, dtype, device, seed + 1),
        feature_extractor=None,
        image_encoder=encoder,  # its dtype is looked at
        super_res_first=random(UNet2DModel, small, dtype, device, seed + 2),
        super_res_last=random(UNet2DModel, small, dtype, device, seed + 3),
        decoder_scheduler=made(
            UnCLIPScheduler, variance_type="learned_range", clip_sample_range=1.0
        ),
        super_res_scheduler=made(UnCLIPScheduler, clip_sample_range=1.0),
    )


def _kandinsky(net: Any, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
    """MOVQ has its published shape; it stays with diffusers."""
    width = HEAD * max(1, round(2 * scale))
    movq = {
        "block_out_channels": [width, 2 * width, 2 * width, 4 * width],
        "down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 2,
        "latent_channels": 4,
        "num_vq_embeddings": 16384,
        "vq_embed_dim": 4,
        "norm_type": "spatial",
    }
    return made(
        KandinskyV22Pipeline,
        unet=net,
        movq=random(VQModel, movq, dtype, device, seed + 1),
        scheduler=made(
            DDPMScheduler,
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            variance_type="learned_range",
        ),
    )


def _if(net: Any, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
    """The first stage without T5: its embeddings are arguments of the call."""
    absent = ("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")
    return made(
        IFPipeline,
        unet=net,
        scheduler=made(
            DDPMScheduler,
            beta_schedule="squaredcos_cap_v2",
            variance_type="learned_range",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.5,
        ),
        requires_safety_checker=False,
        **dict.fromkeys(absent),
    )


UNCLIP = AddedPreset(_unclip, heads=5, channels=3, text=1536, more={"class_embed_type": "identity"})
KANDINSKY22 = AddedPreset(
    _kandinsky,
    heads=6,
    channels=4,
    text=768,
    told=1280,
    more={"encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"},
)
IF = AddedPreset(
    _if,
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
