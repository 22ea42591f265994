"""Real architectures with random weights at any scale, without a download: `preset_unet` for Stable
Diffusion 1.5, 2.1 and XL, `preset_sd3` for 3 and 3.5, `preset_unet2d` for what draws without a
text, `preset_latent` for latent diffusion and the upscaler, `preset_prior` for UnCLIP's prior,
`preset_added` for UnCLIP, Kandinsky and DeepFloyd IF, `preset_dit` for DiT and PixArt,
`preset_flow` for FLUX, Z-Image and Qwen-Image, `preset_aura` for AuraFlow."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL

from fastdiff.bench.preset_added import IF, KANDINSKY22, UNCLIP
from fastdiff.bench.preset_aura import AURAFLOW
from fastdiff.bench.preset_dit import DIT_256, DIT_512, PIXART_ALPHA, PIXART_SIGMA
from fastdiff.bench.preset_flow import FLUX, FLUX2, QWEN_IMAGE, Z_IMAGE
from fastdiff.bench.preset_latent import LDM, X4
from fastdiff.bench.preset_parts import Preset, without_memory
from fastdiff.bench.preset_prior import PRIOR
from fastdiff.bench.preset_sd3 import SD3, SD35_LARGE, SD35_MEDIUM
from fastdiff.bench.preset_unet import SD15, SD21, SDXL, TINY
from fastdiff.bench.preset_unet2d import CONSISTENCY_64, DDPM_256, DDPM_CIFAR
from fastdiff.errors import UserError

_SD3 = {"sd3": SD3, "sd35-medium": SD35_MEDIUM, "sd35-large": SD35_LARGE}
PRESETS: Mapping[str, Preset] = {
    **{"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "tiny": TINY},
    **_SD3,
    **{f"{name}-t5": replace(preset, t5=True) for name, preset in _SD3.items()},
    **{"ddpm-cifar": DDPM_CIFAR, "ddpm-256": DDPM_256, "consistency-64": CONSISTENCY_64},
    "prior": PRIOR,
    **{"unclip": UNCLIP, "kandinsky22": KANDINSKY22, "if": IF},
    **{"ldm": LDM, "x4": X4, "dit-256": DIT_256, "dit-512": DIT_512},
    **{"pixart-alpha": PIXART_ALPHA, "pixart-sigma": PIXART_SIGMA, "flux": FLUX, "flux2": FLUX2},
    **{"auraflow": AURAFLOW, "z-image": Z_IMAGE, "qwen-image": QWEN_IMAGE},
}


def preset_named(name: str) -> Preset:
    """The preset called `name`. UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"--preset is {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def build(name: str, scale: float, dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """The pipeline of preset `name`, with widths and picture scaled by `scale` in (0, 1].

    Random weights are scaled so that every layer keeps its input's magnitude: outputs are finite,
    pictures are noise. UserError for an unknown name or a scale out of range.
    """
    preset = preset_named(name)
    if not 0 < scale <= 1:
        raise UserError(f"--scale is {scale:g}; it must be above 0 and at most 1")
    torch.manual_seed(seed)
    return preset.pipeline(scale * preset.base_scale, dtype, device, seed)


def blueprint(name: str) -> tuple[torch.nn.Module, int]:
    """The denoising network of preset `name` without memory (on the meta device), and its latents'
    side, 0 if they are not a picture. UserError for an unknown name."""
    preset = preset_named(name)
    cls, config = preset.network(preset.base_scale)
    side = config.get("sample_size", 0)
    if not side and callable(sized := getattr(preset, "side", None)):
        side = sized(preset.base_scale)
    return without_memory(cls, config), side


def autoencoder(preset: Preset, **changed: Any) -> Any:
    """A preset's autoencoder without memory, None if it has none; `changed`: changes to its
    config."""
    config = preset.autoencoder(preset.base_scale)
    cls = getattr(preset, "vae", AutoencoderKL)
    return None if config is None else without_memory(cls, config | changed)
