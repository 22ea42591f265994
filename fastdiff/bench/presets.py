"""Real architectures with random weights: SD1.5, SD2.1 and SDXL at any scale, no download.

Scaling keeps the block structure and the head widths, and takes heads away: SD1.5 at 1/4 has
2 heads of 40, 80 and 160 instead of 8, and a picture a quarter as high and wide.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from fastdiff.bench.saved import Saved
from fastdiff.demo import DEMO_FOLDER, quiet
from fastdiff.errors import UserError

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
XL_TIME_IDS, XL_TIME_WIDTH = 6, 256


@dataclass(frozen=True)
class Text:
    """A CLIP text encoder: its width (heads of 64), layers and activation."""

    width: int
    layers: int
    act: str


@dataclass(frozen=True)
class Preset:
    """An architecture at scale 1. `unit` is the width of one head in the first block."""

    channels: tuple[int, ...]
    heads: tuple[int, ...]
    unit: int
    attention: tuple[bool, ...]  # which down blocks have it
    depth: tuple[int, ...]  # transformer layers of each block
    texts: tuple[Text, ...]
    latent_size: int
    scaling_factor: float
    linear_projection: bool = True
    v_prediction: bool = False
    base_scale: float = 1.0

    @property
    def xl(self) -> bool:
        return len(self.texts) == 2


SD15 = Preset(
    channels=(320, 640, 1280, 1280),
    heads=(8, 8, 8, 8),
    unit=40,
    attention=(True, True, True, False),
    depth=(1, 1, 1, 1),
    texts=(Text(768, 12, "quick_gelu"),),
    latent_size=64,
    scaling_factor=0.18215,
    linear_projection=False,
)
SD21 = replace(
    SD15,
    heads=(5, 10, 20, 20),
    unit=64,
    texts=(Text(1024, 23, "gelu"),),
    latent_size=96,
    linear_projection=True,
    v_prediction=True,
)
SDXL = Preset(
    channels=(320, 640, 1280),
    heads=(5, 10, 20),
    unit=64,
    attention=(False, True, True),
    depth=(1, 2, 10),
    texts=(Text(768, 12, "quick_gelu"), Text(1280, 32, "gelu")),
    latent_size=128,
    scaling_factor=0.13025,
)
PRESETS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "tiny": replace(SD15, base_scale=0.25)}


def build(name: str, scale: float, dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """The pipeline of preset `name` with widths and picture scaled by `scale` in (0, 1].

    Weights are random, so that every layer keeps its input's scale: outputs are finite and of
    unit size, pictures are noise. UserError for an unknown name or a scale out of range.
    """
    if name not in PRESETS:
        raise UserError(f"--preset is {name!r}; choose one of {', '.join(PRESETS)}")
    if not 0 < scale <= 1:
        raise UserError(f"--scale is {scale:g}; it must be above 0 and at most 1")
    preset = PRESETS[name]
    scale *= preset.base_scale
    texts = [replace(t, width=64 * max(1, round(t.width * scale / 64))) for t in preset.texts]
    torch.manual_seed(seed)
    tokenizer: Any = CLIPTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer", model_max_length=77)
    encoders = [
        _text_encoder(text, tokenizer, projection=i == 1).to(device, dtype)
        for i, text in enumerate(texts)
    ]
    unet = _random(UNet2DConditionModel, unet_config(preset, scale, texts), dtype, device, seed)
    vae = _random(AutoencoderKL, vae_config(preset, scale), dtype, device, seed + 1)
    if preset.xl:
        return _make(
            StableDiffusionXLPipeline,
            vae=vae,
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=unet,
            scheduler=_make(
                EulerDiscreteScheduler, **SCHEDULE, timestep_spacing="leading", steps_offset=1
            ),
            add_watermarker=False,
        )
    # DDIM, not SD1.5's own PNDM: that one calls the U-Net once more than there are steps.
    scheduler = _make(
        DDIMScheduler,
        **SCHEDULE,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if preset.v_prediction else "epsilon",
    )
    return _make(
        StableDiffusionPipeline,
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def blueprint(name: str) -> tuple[torch.nn.Module, int]:
    """The U-Net of preset `name` without memory (on the meta device), and its latents' side."""
    preset = PRESETS[name]
    config = unet_config(preset, preset.base_scale, list(preset.texts))
    with torch.device("meta"):
        return _make(UNet2DConditionModel, **config).eval(), config["sample_size"]


def autoencoder(preset: Preset, **changed: Any) -> Any:
    """The autoencoder of a preset without memory; `changed`: of its config."""
    with torch.device("meta"):
        return _make(AutoencoderKL, **vae_config(preset, preset.base_scale) | changed).eval()


def from_folder(saved: Saved, dtype: torch.dtype) -> Any:
    """The pipeline that was checked by `saved.check_folder`, on the CPU, loaded in silence.

    Raises UserError where a file lacks weights that a network has: transformers would draw them at
    random, and diffusers leave them without memory.
    """
    shared: Any = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    with quiet():
        encoders = {}
        for net in saved.networks:
            if net.library == "transformers":
                read: Any = getattr(transformers, net.kind).from_pretrained
                encoders[net.folder.name], told = read(
                    net.folder, variant=net.variant, output_loading_info=True, **shared
                )
                _need_all(net.folder, told["missing_keys"])
        pipeline: Any = getattr(diffusers, saved.pipeline)
        pipe = pipeline.from_pretrained(saved.folder, variant=saved.variant, **shared, **encoders)
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            weights = module.named_parameters()
            _need_all(saved.folder / name, [key for key, weight in weights if weight.is_meta])
    return pipe


def _need_all(folder: Path, missing: Collection[str]) -> None:
    if missing:
        raise UserError(
            f"{folder}: its weights lack {min(missing)}, one of {len(missing)} that its config.json"
            " asks for; save or copy it again"
        )


def unet_config(preset: Preset, scale: float, texts: list[Text]) -> dict[str, Any]:
    """The UNet2DConditionModel config of `preset` at `scale` with the given text encoders."""
    whole = preset.channels[0] // preset.unit
    units = max(1, round(whole * scale))
    channels = [c * units // whole for c in preset.channels]
    down = ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in preset.attention]
    up = ["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in preset.attention[::-1]]
    divisor = gcd(*channels)
    config: dict[str, Any] = {
        "sample_size": max(8, 8 * round(preset.latent_size * scale / 8)),
        "block_out_channels": channels,
        "down_block_types": down,
        "up_block_types": up,
        "attention_head_dim": [h * units // whole for h in preset.heads],  # diffusers: head count
        "transformer_layers_per_block": list(preset.depth),
        "cross_attention_dim": sum(t.width for t in texts),
        "use_linear_projection": preset.linear_projection,
        "norm_num_groups": max(g for g in range(1, 33) if divisor % g == 0),
    }
    if preset.xl:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": XL_TIME_WIDTH,
            "projection_class_embeddings_input_dim": texts[1].width + XL_TIME_IDS * XL_TIME_WIDTH,
        }
    return config


def vae_config(preset: Preset, scale: float) -> dict[str, Any]:
    """The AutoencoderKL config every Stable Diffusion shares, at `scale`; it draws 8x8 a latent."""
    width = 32 * max(1, round(4 * scale))
    return {
        "block_out_channels": [width, 2 * width, 4 * width, 4 * width],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": preset.scaling_factor,
        "force_upcast": False,
    }


def _make(cls: Any, **arguments: Any) -> Any:
    """`cls(**arguments)`, for constructors that carry no types."""
    return cls(**arguments)


def _text_encoder(text: Text, tokenizer: Any, projection: bool) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=text.width,
        intermediate_size=4 * text.width,
        projection_dim=text.width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.width // 64,
        max_position_embeddings=77,
        hidden_act=text.act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _make(CLIPTextModelWithProjection if projection else CLIPTextModel, config=config).eval()


def _random(
    cls: type, config: dict[str, Any], dtype: torch.dtype, device: str, seed: int
) -> torch.nn.Module:
    """A network of `cls` whose weights are drawn straight in `dtype` on `device`.

    Built on the meta device first: SDXL in float32 with torch's own initialisation takes 10 GB
    and minutes before the first cast.
    """
    with torch.device("meta"):
        net: torch.nn.Module = cls(**config)
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
