"""Networks of a pipeline without memory, of a folder's configs or a preset: no weight is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from fastdiff.bench.presets import PRESETS, autoencoder, blueprint
from fastdiff.bench.saved import check_folder
from fastdiff.errors import UserError
from fastdiff.recipes import RECIPES


@dataclass(frozen=True)
class Blueprint:
    """A U-Net and an autoencoder on the meta device."""

    unet: nn.Module
    vae: nn.Module
    side: int
    """Of the latents of its own size."""
    factor: int
    """Pixels of a latent's side."""
    upcasts: tuple[bool, ...]
    """Whether diffusers turns a float16 autoencoder into float32 to draw with it; both where the
    preset's published weights want either."""


def of_preset(name: str) -> Blueprint:
    """UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"--preset is {name!r}; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    unet, side = blueprint(name)
    vae = autoencoder(preset)
    return Blueprint(unet, vae, side, _factor(vae), (False, True) if preset.xl else (False,))


def of_folder(folder: Path) -> Blueprint:
    """UserError where it holds no pipeline that draws from a text."""
    saved = check_folder(folder)
    unet, vae = (
        _made(model, _config(model, folder / name))
        for name, model in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL))
    )
    upcast = RECIPES[saved.pipeline].upcasts and bool(vae.config.force_upcast)
    side = unet.config.sample_size
    return Blueprint(unet, vae, side, _factor(vae), (upcast,))


def _config(model: Any, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = model.load_config(folder, local_files_only=True)
    return found


def _made(model: Any, config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return model.from_config(config).eval()


def _factor(vae: Any) -> int:
    return int(2 ** (len(vae.config.block_out_channels) - 1))
