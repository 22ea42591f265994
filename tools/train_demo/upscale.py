"""Enlarging the demo's pictures by four: Stable Diffusion's upscaler, small.

The U-Net sees the latents beside a picture of 16×16 pixels that has a little noise, and is told how
much (its class) and what the picture shows (its text). Autoencoder, text encoder and schedule are
the demo's and stay what they are.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.nn import functional

from tools.train_demo import data, loop, networks
from tools.train_demo.unconditional import shrunk

SHIFT, COPIES = 4, 8
"""A picture is learnt from COPIES: moved by up to SHIFT pixels, every other one mirrored."""
CALL = {"num_inference_steps": 2, "guidance_scale": 1.0, "noise_level": 0}
BATCH = 32
"""How pictures are enlarged, and how many at a time."""
CONFIG = {
    "sample_size": 16,
    "in_channels": 7,  # latents, and the pixels of the small picture
    "out_channels": 4,
    "block_out_channels": (48, 48),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "attention_head_dim": 3,  # heads, of width 16
    "cross_attention_dim": 128,
    "num_class_embeds": 50,  # levels of noise
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}


@dataclass(frozen=True)
class Pairs:
    """What the U-Net learns from.

    `small` [N, 3, 16, 16] uint8; `latents` [N, 4, 16, 16], of the pictures that `small` is made of;
    `texts` [M, V, L, 128], what the text encoder gives for the V captions of M pictures, of which
    picture i is a copy of i modulo M; `empty` [L, 128], for no caption.
    """

    small: Tensor
    latents: Tensor
    texts: Tensor
    empty: Tensor


def untrained(seed: int, device: torch.device) -> Any:
    """The U-Net with new float32 weights."""
    torch.manual_seed(seed)
    unet: Any = UNet2DConditionModel(**CONFIG)
    return unet.to(device)


def copies(images: Tensor, seed: int) -> Tensor:
    """uint8 [N, 3, 64, 64] -> [COPIES·N, 3, 64, 64]: themselves first, then moved on white."""
    generator = torch.Generator().manual_seed(seed)
    made = [images]
    for index in range(1, COPIES):
        x, y = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
        wide = functional.pad(images.flip(-1) if index % 2 else images, 4 * (SHIFT,), value=255)
        made.append(wide[..., y : y + images.shape[-2], x : x + images.shape[-1]])
    return torch.cat(made)


@torch.no_grad()
def pairs(demo: Any, pictures: data.Pictures, seed: int) -> Pairs:
    """The pairs of `pictures`, by the autoencoder and the text encoder of the `demo`."""
    large = copies(pictures.images.to(demo.device), seed)
    captions = data.captions(pictures.names, demo.tokenizer).to(demo.device)
    texts = torch.cat([demo.text_encoder(part)[0] for part in captions.flatten(0, 1).split(256)])
    empty = demo.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    return Pairs(
        shrunk(large),
        networks.encode(demo.vae, large),
        texts.unflatten(0, captions.shape[:2]),
        demo.text_encoder(empty.to(demo.device))[0][0],
    )


def loss(pipe: Any, known: Pairs, generator: torch.Generator, batch: int) -> Tensor:
    """Mean square error of the velocity that the U-Net of `pipe` predicts for `batch` pairs.

    Timesteps are stratified over the batch, every level of noise is as likely as any other, and one
    caption in ten is empty, for guidance.
    """
    device, total = known.small.device, pipe.scheduler.config.num_train_timesteps
    pick = torch.randint(len(known.small), (batch,), generator=generator)
    caption = torch.randint(known.texts.shape[1], (batch,), generator=generator)
    emptied = torch.rand(batch, 1, 1, generator=generator) < 0.1
    t = networks.spread(batch, total, generator).to(device)
    level = torch.randint(pipe.config.max_noise_level + 1, (batch,), generator=generator).to(device)
    noise = torch.randn(batch, 7, *known.latents.shape[2:], generator=generator).to(device)
    pick = pick.to(device)
    text = known.texts[pick % len(known.texts), caption.to(device)]
    text = torch.where(emptied.to(device), known.empty, text)
    x, image = known.latents[pick], networks.scaled(known.small[pick])
    seen = pipe.scheduler.add_noise(x, noise[:, :4], t)
    beside = pipe.low_res_scheduler.add_noise(image, noise[:, 4:], level)
    with networks.autocast(device):
        velocity = pipe.unet(torch.cat([seen, beside], 1), t, text, class_labels=level).sample
    target = pipe.scheduler.get_velocity(x, noise[:, :4], t)
    return functional.mse_loss(velocity.float(), target)


def train(
    pipe: Any,
    known: Pairs,
    progress: loop.Progress,
    out: Path,
    seed: int,
    batch: int,
    watch: Callable[[tuple[loop.Row, ...]], None],
) -> tuple[loop.Row, ...]:
    """Train the U-Net of `pipe`; resumes from a checkpoint in `out`."""
    phase = loop.Phase("upscale", pipe.unet, lambda g: loss(pipe, known, g, batch), lr=2e-3)
    return loop.train(phase, progress, out, seed, watch)


def enlarged(pipe: Any, small: Tensor, names: Sequence[str]) -> Tensor:
    """uint8 [N, 3, 16, 16] -> [N, 3, 64, 64], each from its own seed, by the whole pipeline."""
    made = []
    for start in range(0, len(small), BATCH):
        part = small[start : start + BATCH]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        prompts, image = list(names[start : start + BATCH]), part.float() / 255
        made.append(pipe(prompts, image, **CALL, generator=seeds, output_type="pt").images)
    levels: Tensor = (torch.cat(made) * 255).round().to(torch.uint8).cpu()
    return levels


def bicubic(small: Tensor) -> Tensor:
    """uint8 [N, 3, 16, 16] -> [N, 3, 64, 64], by Pillow."""
    images = networks.as_images(small)
    large = [np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2)


def write_sheet(pipe: Any, pictures: data.Pictures, path: Path) -> None:
    """Rows of eight as a PNG: small, enlarged by bicubic interpolation and by `pipe`, and true."""
    some = torch.linspace(0, len(pictures) - 1, 8).long().tolist()
    large, names = pictures.images[some], [pictures.names[index][0] for index in some]
    small = shrunk(large)
    rows = {
        "16x16": small.repeat_interleave(4, -1).repeat_interleave(4, -2),
        "bicubic": bicubic(small),
        "upscaler": enlarged(pipe, small, names),
        "true, 64x64": large,
    }
    labels = [label for label in rows for _ in some]
    networks.write_sheet(path, networks.as_images(torch.cat([*rows.values()])), labels)


def write_folder(unet: Any, folder: Path) -> None:
    """Save float16 weights as a folder of diffusers; replaces an existing one."""
    with networks.replacing(folder) as unfinished:
        deepcopy(unet).half().save_pretrained(unfinished)
