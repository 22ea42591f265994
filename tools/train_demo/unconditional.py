"""DDPM on the demo's pictures, without a text: a `UNet2DModel` that draws from noise alone.

Ho et al. 2020 (https://arxiv.org/abs/2006.11239): `loss` is Algorithm 1, training. Algorithm 2,
sampling, is what `DDPMPipeline` runs, and what fastdiff makes fast.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional

from tools.train_demo import loop, networks

SIDE = 16
SHEET, STEPS = 16, 100
"""Pictures of a sheet, and steps of each."""
CONFIG = {
    "sample_size": SIDE,
    "block_out_channels": (32, 48),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 16,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def untrained(seed: int, device: torch.device) -> Any:
    """The U-Net with new float32 weights; 0.46 M parameters."""
    torch.manual_seed(seed)
    unet: Any = UNet2DModel(**CONFIG)
    return unet.to(device)


def shrunk(images: Tensor) -> Tensor:
    """uint8 pictures [N, 3, 64, 64] -> [N, 3, 16, 16], each pixel the mean of sixteen."""
    return functional.avg_pool2d(images.float(), 4).round().to(torch.uint8)


def loss(unet: Any, images: Tensor, generator: torch.Generator, batch: int) -> Tensor:
    """Algorithm 1, for `batch` of the uint8 `images` [N, 3, Y, X].

    Pick pictures x₀, timesteps t and noise ε; the loss is |ε - ε_θ(√ᾱ x₀ + √(1-ᾱ) ε, t)|², as mean
    over pixels. Every timestep is as likely as any other; over a batch they are spread evenly.
    """
    scheduler: Any = DDPMScheduler()
    device, total = images.device, scheduler.config.num_train_timesteps
    pick = torch.randint(len(images), (batch,), generator=generator)
    t = networks.spread(batch, total, generator).to(device)
    noise = torch.randn(batch, *images.shape[1:], generator=generator).to(device)
    noisy = scheduler.add_noise(networks.scaled(images[pick.to(device)]), noise, t)
    with networks.autocast(device):
        predicted = unet(noisy, t).sample
    return functional.mse_loss(predicted.float(), noise)


def train(
    unet: Any, images: Tensor, progress: loop.Progress, out: Path, seed: int, batch: int, watch: Any
) -> tuple[loop.Row, ...]:
    """Train on uint8 `images` [N, 3, 16, 16]; resumes from a checkpoint in `out`."""
    phase = loop.Phase("unconditional", unet, lambda g: loss(unet, images, g, batch), lr=2e-3)
    return loop.train(phase, progress, out, seed, watch)


def pipeline(unet: Any) -> Any:
    """The U-Net as a diffusers pipeline; weights are shared, not copied."""
    build: Any = DDPMPipeline
    pipe = build(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_sheet(unet: Any, path: Path, seed: int = 0) -> None:
    """Pictures by Algorithm 2, on a tenth of its timesteps, as a PNG."""
    generator = torch.Generator().manual_seed(seed)
    pictures = pipeline(unet)(SHEET, generator, STEPS).images
    networks.write_sheet(path, pictures, [""] * SHEET)


def write_folder(unet: Any, folder: Path) -> None:
    """Save float16 weights as a diffusers folder; replaces an existing one."""
    with networks.replacing(folder) as unfinished:
        pipeline(deepcopy(unet).half()).save_pretrained(unfinished)
