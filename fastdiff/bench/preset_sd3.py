"""Stable Diffusion 3 and 3.5, whose transformers attend to picture and text together.

Scaling keeps the layers and the heads' width of 64, and removes heads: SD3 at 1/8 has 3 heads
instead of 24, and a picture of an eighth of the height and width. The largest picture stays the
published one. A preset has no T5, as for users without memory for its 4.8 billion weights:
diffusers then pads CLIP's 77 tokens with 256 zeros. With T5, its tokens take their place.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.embeddings import PatchEmbed
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import T5Config, T5EncoderModel, T5TokenizerFast  # type: ignore[attr-defined]

from fastdiff.bench.preset_parts import (
    CLIP_G,
    CLIP_L,
    HEAD,
    clip,
    clip_tokenizer,
    heads_of,
    made,
    random,
    scaled_texts,
    side_of,
    vae_config,
)

TEXTS = (CLIP_L, CLIP_G)
PATCH, CHANNELS, LATENT_SIZE = 2, 16, 128
T5_WIDTH, T5_LAYERS, T5_INNER = 4096, 24, 160
"""T5-XXL's width, layers, and the width of its MLP per head."""


@dataclass(frozen=True)
class SD3Preset:
    """An architecture at scale 1."""

    layers: int
    heads: int
    pos_embed_max_size: int
    """Patches along a side of the largest picture."""
    dual_layers: int = 0
    """How many of the first layers have a second attention, of the picture only."""
    qk_norm: str | None = None
    t5: bool = False
    """Whether T5 reads the prompt, too."""
    base_scale: float = 1.0

    upcasts = (False,)

    def network(self, scale: float) -> tuple[Any, dict[str, Any]]:
        heads = max(1, round(self.heads * scale))
        return SD3Transformer2DModel, {
            "sample_size": side_of(LATENT_SIZE, scale),
            "patch_size": PATCH,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": self.layers,
            "attention_head_dim": HEAD,
            "num_attention_heads": heads,
            "caption_projection_dim": HEAD * heads,
            "joint_attention_dim": text_width(scale),
            "pooled_projection_dim": sum(text.width for text in scaled_texts(TEXTS, scale)),
            "pos_embed_max_size": self.pos_embed_max_size,
            "dual_attention_layers": tuple(range(self.dual_layers)),
            "qk_norm": self.qk_norm,
        }

    def autoencoder(self, scale: float) -> dict[str, Any]:
        return vae_config(scale, scaling_factor=1.5305) | {
            "latent_channels": CHANNELS,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        tokenizer = clip_tokenizer()
        encoders = [
            clip(text, tokenizer, projection=True).to(device, dtype)
            for text in scaled_texts(TEXTS, scale)
        ]
        cls, config = self.network(scale)
        transformer = random(cls, config, dtype, device, seed)
        transformer.pos_embed.pos_embed.copy_(positions(config))
        tokenizer_3 = t5_tokenizer(tokenizer) if self.t5 else None
        return made(
            StableDiffusion3Pipeline,
            transformer=transformer,
            vae=random(AutoencoderKL, self.autoencoder(scale), dtype, device, seed + 1),
            text_encoder=encoders[0],
            tokenizer=tokenizer,
            text_encoder_2=encoders[1],
            tokenizer_2=tokenizer,
            text_encoder_3=t5(scale, tokenizer_3, dtype, device, seed + 2) if self.t5 else None,
            tokenizer_3=tokenizer_3,
            scheduler=made(FlowMatchEulerDiscreteScheduler, shift=3.0),
        )


def text_width(scale: float) -> int:
    """T5's width, which all tokens have: at least that of both CLIPs together."""
    clips = sum(text.width for text in scaled_texts(TEXTS, scale))
    return max(HEAD * heads_of(T5_WIDTH * scale), clips)


def positions(config: dict[str, Any]) -> torch.Tensor:
    """The positions of all patches [1, most · most, width] float32, as diffusers computes them."""
    embed = made(
        PatchEmbed,
        height=config["sample_size"],
        width=config["sample_size"],
        patch_size=PATCH,
        in_channels=1,
        embed_dim=config["attention_head_dim"] * config["num_attention_heads"],
        pos_embed_max_size=config["pos_embed_max_size"],
    )
    found: torch.Tensor = embed.pos_embed
    return found


def t5(scale: float, tokenizer: Any, dtype: torch.dtype, device: str, seed: int) -> Any:
    """T5-XXL's encoder with random weights."""
    width = text_width(scale)
    heads = width // HEAD
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=HEAD,
        num_heads=heads,
        d_ff=T5_INNER * heads,
        num_layers=T5_LAYERS,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoder = random(T5EncoderModel, {"config": config}, dtype, device, seed)
    encoder.tie_weights()
    for block in encoder.encoder.block:  # T5 does not scale scores: its weights include that factor
        block.layer[0].SelfAttention.q.weight.data.mul_(HEAD**-0.5)
    return encoder


def t5_tokenizer(other: Any) -> Any:
    """A T5 tokenizer with a CLIP tokenizer's words; it spells other words in pieces."""
    special = ("<pad>", "</s>", "<unk>")
    words = {token.replace("</w>", "") for token in other.get_vocab()} - {""}
    pieces = sorted({"▁", *words, *(f"▁{word}" for word in words)})
    scores = [(piece, 0.0) for piece in special] + [(piece, -1.0) for piece in pieces]
    model = Unigram(scores, unk_id=special.index("<unk>"))
    with TemporaryDirectory() as folder:
        Tokenizer(model).save(str(Path(folder) / "tokenizer.json"))
        read: Any = T5TokenizerFast.from_pretrained
        return read(folder, local_files_only=True)


SD3 = SD3Preset(layers=24, heads=24, pos_embed_max_size=192)
SD35_MEDIUM = SD3Preset(
    layers=24, heads=24, pos_embed_max_size=384, dual_layers=13, qk_norm="rms_norm"
)
SD35_LARGE = SD3Preset(layers=38, heads=38, pos_embed_max_size=192, qk_norm="rms_norm")
