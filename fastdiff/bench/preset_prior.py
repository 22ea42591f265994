"""UnCLIP's prior with the published sizes of Karlo's, 20 layers of 32 heads.

Scaling keeps the layers and the heads' width of 64, and removes heads; the embedding gets narrower
in proportion. The sizes are from memory of Karlo's config.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import KandinskyV22PriorPipeline, PriorTransformer, UnCLIPScheduler
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from fastdiff.bench.preset_parts import (
    CLIP_L,
    HEAD,
    clip,
    clip_tokenizer,
    heads_of,
    made,
    random,
)

TOKENS, PIXELS = 77, 32
CLIPPED = 5.0
"""The largest number of a predicted embedding, which the scheduler clips to."""


@dataclass(frozen=True)
class PriorPreset:
    """An architecture at scale 1."""

    layers: int = 20
    heads: int = 32
    embedding: int = CLIP_L.width
    base_scale: float = 1.0

    upcasts = (False,)

    def network(self, scale: float) -> tuple[Any, dict[str, Any]]:
        return PriorTransformer, {
            "num_layers": self.layers,
            "num_attention_heads": max(1, round(self.heads * scale)),
            "attention_head_dim": HEAD,
            "embedding_dim": HEAD * heads_of(self.embedding * scale),
            "num_embeddings": TOKENS,
            "additional_embeddings": 4,
        }

    def autoencoder(self, scale: float) -> None:
        """A prior has none."""

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        """It makes an image embedding of a text."""
        cls, config = self.network(scale)
        prior = random(cls, config, dtype, device, seed)
        prior.causal_attention_mask.fill_(-10000.0).triu_(1)
        prior.clip_std.data.fill_(1.0)
        tokenizer, wide = clip_tokenizer(), config["embedding_dim"]
        vision = CLIPVisionConfig(
            hidden_size=HEAD,
            intermediate_size=HEAD,
            projection_dim=wide,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=PIXELS,
            patch_size=PIXELS,
        )
        eyes: Any = made(CLIPVisionModelWithProjection, config=vision)
        return made(
            KandinskyV22PriorPipeline,
            prior=prior,
            image_encoder=eyes.eval().to(device, dtype),
            text_encoder=clip(replace(CLIP_L, width=wide), tokenizer, True).to(device, dtype),
            tokenizer=tokenizer,
            scheduler=made(
                UnCLIPScheduler,
                variance_type="fixed_small_log",
                prediction_type="sample",
                clip_sample_range=CLIPPED,
            ),
            image_processor=made(CLIPImageProcessor, size=PIXELS, crop_size=PIXELS),
        )


PRIOR = PriorPreset()
