"""Parts that all presets share: text encoders, the autoencoder, random weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from fastdiff.demo import DEMO_FOLDER

HEAD = 64
"""The width of a head in every text encoder."""


class Preset(Protocol):
    """An architecture with its published sizes at scale 1."""

    @property
    def base_scale(self) -> float:
        """What `--scale 1` means; below 1 for a preset that is a smaller version."""

    @property
    def upcasts(self) -> tuple[bool, ...]:
        """Whether diffusers casts a float16 autoencoder to float32 to decode; both values if
        published weights differ in this."""

    def network(self, scale: float) -> tuple[Any, dict[str, Any]]:
        """The class of the denoising network, and its config."""

    def autoencoder(self, scale: float) -> dict[str, Any] | None:
        """The config of its autoencoder; None if it has none that fastdiff computes."""

    def pipeline(self, scale: float, dtype: torch.dtype, device: str, seed: int) -> Any:
        """The whole pipeline with random weights."""


@dataclass(frozen=True)
class Text:
    """A CLIP text encoder: its width (with heads of 64), layers and activation."""

    width: int
    layers: int
    act: str


CLIP_L = Text(768, 12, "quick_gelu")
CLIP_G = Text(1280, 32, "gelu")
"""The two text encoders that SDXL and Stable Diffusion 3 share."""


def heads_of(width: float) -> int:
    """The number of heads of 64 nearest to a width; at least one."""
    return max(1, round(width / HEAD))


def scaled_texts(texts: Sequence[Text], scale: float) -> list[Text]:
    """The text encoders with fewer heads."""
    return [replace(text, width=HEAD * heads_of(text.width * scale)) for text in texts]


def side_of(latent_size: int, scale: float) -> int:
    """The latents' side at a scale; a multiple of 8."""
    return max(8, 8 * round(latent_size * scale / 8))


def vae_config(scale: float, scaling_factor: float) -> dict[str, Any]:
    """The AutoencoderKL config that all Stable Diffusions share; 8×8 pixels per latent."""
    width = 32 * max(1, round(4 * scale))
    return {
        "block_out_channels": [width, 2 * width, 4 * width, 4 * width],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": scaling_factor,
        "force_upcast": False,
    }


def clip_tokenizer() -> Any:
    """The demo's tokenizer, with the length of published ones."""
    read: Any = CLIPTokenizer.from_pretrained
    return read(DEMO_FOLDER / "tokenizer", model_max_length=77)


def clip(text: Text, tokenizer: Any, projection: bool) -> Any:
    """A CLIP text encoder with random weights, float32 on the CPU."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=text.width,
        intermediate_size=4 * text.width,
        projection_dim=text.width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.width // HEAD,
        max_position_embeddings=77,
        hidden_act=text.act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return made(CLIPTextModelWithProjection if projection else CLIPTextModel, config=config).eval()


def made(cls: Any, **arguments: Any) -> Any:
    """`cls(**arguments)`, for constructors without types."""
    return cls(**arguments)


def without_memory(cls: Any, config: dict[str, Any]) -> Any:
    """A network on the meta device."""
    with torch.device("meta"):
        return made(cls, **config).eval()


def random(cls: Any, config: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Any:
    """A network of `cls` with random weights in `dtype` on `device`; buffers are not initialised.

    It is built on the meta device first: SDXL in float32 with torch's own initialisation takes
    10 GB and minutes before the first cast.
    """
    net = without_memory(cls, config)
    net = torch.nn.Module.to(net, dtype=dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in net.named_parameters():
        if weight.ndim > 1:
            fan_in = weight.numel() // weight.shape[0]
            torch.nn.init.normal_(weight, 0.0, fan_in**-0.5, generator)
        else:
            mean = 0.0 if name.endswith("bias") else 1.0
            torch.nn.init.normal_(weight, mean, 0.02, generator)
    return net
