"""Networks without memory, from a folder's configs or a preset; no weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from fastdiff.bench.presets import autoencoder, blueprint, preset_named
from fastdiff.bench.saved import check_folder
from fastdiff.bench.source import Source, folder_of
from fastdiff.demo import DEMO_FOLDER
from fastdiff.families import family
from fastdiff.recipes import RECIPES, Recipe

SIDE = 128
"""The latents' side for networks whose config has none, as their pipelines set it."""


@dataclass(frozen=True)
class Blueprint:
    """The denoising network and an autoencoder, on the meta device."""

    denoiser: nn.Module
    vae: nn.Module | None
    """None if the network draws pixels, or embeddings."""
    side: int
    """The latents' side at the network's own size; 0 if they are not a picture."""
    factor: int
    """Pixels per latent side."""
    upcasts: tuple[bool, ...]
    """Whether diffusers casts a float16 autoencoder to float32 to decode; both values if a preset's
    published weights differ in this."""

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.denoiser,) if self.vae is None else (self.denoiser, self.vae)


def named(source: Source, command: str) -> Blueprint:
    """The networks of a preset, folder, hub id or demo. UserError if `command` cannot take it."""
    source.check()
    if source.preset:
        return of_preset(source.preset)
    return of_folder(folder_of(source.pipeline, command) or DEMO_FOLDER)


def of_preset(name: str) -> Blueprint:
    """The networks of a preset. UserError for an unknown name."""
    preset = preset_named(name)
    denoiser, side = blueprint(name)
    vae = autoencoder(preset)
    return Blueprint(denoiser, vae, side, _factor(vae), preset.upcasts)


def of_folder(folder: Path) -> Blueprint:
    """The networks of a saved pipeline. UserError unless it draws without a picture."""
    recipe = RECIPES[check_folder(folder).pipeline]
    denoiser = _read(folder, recipe.denoiser, recipe)
    names = [name for name, kind in recipe.networks.items() if kind == "vae"]
    vae = _read(folder, names[0], recipe) if names else None
    upcast = recipe.upcasts and vae is not None and bool(vae.config.force_upcast)
    side = denoiser.config.get("sample_size") or SIDE
    return Blueprint(denoiser, vae, side, _factor(vae), (upcast,))


def _read(folder: Path, name: str, recipe: Recipe) -> Any:
    model: Any = getattr(diffusers, family(recipe.networks[name]).models[0])
    config = model.load_config(folder / name, local_files_only=True)
    with torch.device("meta"):
        return model.from_config(config).eval()


def _factor(vae: Any) -> int:
    return 1 if vae is None else int(2 ** (len(vae.config.block_out_channels) - 1))
