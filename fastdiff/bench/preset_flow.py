"""FLUX.1-dev, FLUX.2-dev, Z-Image and Qwen-Image with their published sizes, without text encoders:
their embeddings are arguments of the call.

Scaling keeps the blocks, the heads' width of 128 and the texts' widths, and removes heads; the
picture and the autoencoder shrink as well.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from fastdiff.bench.preset_parts import made, random, side_of, vae_config

HEAD, AXES = 128, (16, 56, 56)


@dataclass(frozen=True)
class FlowPreset:
    """An architecture at scale 1. `heads`: how many; `latents`: their side."""

    pipe: Any
    model: Any
    heads: int
    config: Callable[[int], dict[str, Any]]
    """(heads) -> the network's config."""
    absent: tuple[str, ...] = ("text_encoder", "tokenizer")
    vae: Any = AutoencoderKL
    schedule: Mapping[str, Any] = field(default_factory=lambda: {"use_dynamic_shifting": True})
    """What differs from its scheduler's default config."""
    latents: int = 128
    base_scale: float = 1.0

    upcasts = (False,)

    def side(self, scale: float) -> int:
        return side_of(self.latents, scale)

    def network(self, scale: float) -> tuple[Any, dict[str, Any]]:
        return self.model, self.config(max(1, round(self.heads * scale)))

    def autoencoder(self, scale: float) -> dict[str, Any] | None:
        """None for Qwen-Image's, which is for videos: fastdiff does not compute it."""
        return None if self.vae is AutoencoderKLQwenImage else self.coder(scale)

    def coder(self, scale: float) -> dict[str, Any]:
        """The config of its autoencoder, of any class."""
        if self.vae is AutoencoderKLQwenImage:
            return {"base_dim": 8 * max(1, round(12 * scale))}
        config = vae_config(scale, scaling_factor=0.3611)
        if self.vae is AutoencoderKLFlux2:
            del config["scaling_factor"], config["force_upcast"]
            return config | {"latent_channels": 32}
        return config | {
            "latent_channels": 16,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        net = random(*self.network(scale), dtype, device, seed)
        coder = random(self.vae, self.coder(scale), dtype, device, seed + 1)
        if self.vae is AutoencoderKLFlux2:
            coder.bn.reset_running_stats()
        if self.model is QwenImageTransformer2DModel:  # its positions are no buffers
            own = net.pos_embed
            net.pos_embed = type(own)(own.theta, own.axes_dim, own.scale_rope)
        pipe = made(
            self.pipe,
            scheduler=made(FlowMatchEulerDiscreteScheduler, **self.schedule),
            vae=coder,
            transformer=net,
            **dict.fromkeys(self.absent),
        )
        pipe.default_sample_size = self.side(scale)
        return pipe


def _flux(heads: int) -> dict[str, Any]:
    return {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": HEAD,
        "num_attention_heads": heads,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": AXES,
    }


def _flux2(heads: int) -> dict[str, Any]:
    return {"num_attention_heads": heads}


def _z_image(heads: int) -> dict[str, Any]:
    return {
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


def _qwen_image(heads: int) -> dict[str, Any]:
    return {
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": HEAD,
        "num_attention_heads": heads,
        "joint_attention_dim": 3584,
        "axes_dims_rope": AXES,
    }


FLUX = FlowPreset(
    *(FluxPipeline, FluxTransformer2DModel, 24, _flux),
    absent=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
)
FLUX2 = FlowPreset(Flux2Pipeline, Flux2Transformer2DModel, 48, _flux2, vae=AutoencoderKLFlux2)
Z_IMAGE = FlowPreset(
    *(ZImagePipeline, ZImageTransformer2DModel, 30, _z_image), schedule={"shift": 3.0}
)
QWEN_IMAGE = FlowPreset(
    *(QwenImagePipeline, QwenImageTransformer2DModel, 24, _qwen_image),
    vae=AutoencoderKLQwenImage,
    schedule={
        "use_dynamic_shifting": True,
        "max_image_seq_len": 8192,
        "max_shift": 0.9,
        "shift_terminal": 0.02,
    },
)
