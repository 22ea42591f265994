"""The demo's networks, untrained; their two losses; and the pipeline folder."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastdiff.demo import DEMO_FOLDER


@dataclass(frozen=True)
class Networks:
    """The parts of the pipeline, with the shipped demo's sizes, vocabulary and noise schedule."""

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any
    scheduler: Any


def untrained(seed: int, device: torch.device) -> Networks:
    """Every network with new float32 weights."""
    torch.manual_seed(seed)
    text_config = CLIPTextConfig.from_pretrained(DEMO_FOLDER / "text_encoder")
    text_config.dtype = torch.float32
    text_encoder: Any = CLIPTextModel(text_config)
    vae: Any = AutoencoderKL
    unet: Any = UNet2DConditionModel
    scheduler: Any = DDIMScheduler
    return Networks(
        CLIPTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer"),
        text_encoder.to(device),
        vae.from_config(vae.load_config(DEMO_FOLDER / "vae")).to(device),
        unet.from_config(unet.load_config(DEMO_FOLDER / "unet")).to(device),
        scheduler.from_pretrained(DEMO_FOLDER / "scheduler"),
    )


def scaled(images: Tensor) -> Tensor:
    """uint8 pictures as the autoencoder's input: float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def autoencoder_loss(vae: Any, images: Tensor, generator: torch.Generator, batch: int) -> Tensor:
    """L1 + 0.5·L1 of gradients + 0.5·MSE + 1e-4·KL on `batch` of `images` [N, 3, 64, 64] uint8."""
    pick = torch.randint(len(images), (batch,), generator=generator)
    x = scaled(images[pick.to(images.device)])
    with autocast(x.device):
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator)).sample
    error = y.float() - x
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = posterior.kl().float().mean() / posterior.mean[0].numel()
    loss: Tensor = error.abs().mean() + 0.5 * edges + 0.5 * error.square().mean() + 1e-4 * kl
    return loss


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """The latent means of uint8 pictures, float32 [N, 4, 16, 16]."""
    parts = torch.split(images, 64)
    return torch.cat([vae.encode(scaled(part)).latent_dist.mean for part in parts])


@torch.no_grad()
def reconstruct(vae: Any, images: Tensor) -> tuple[Tensor, float]:
    """uint8 pictures after the autoencoder: (uint8 pictures, mean PSNR in dB)."""
    parts = [vae.decode(part).sample for part in torch.split(encode(vae, images), 64)]
    drawn = ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round()
    mse = (drawn - images).square().mean((1, 2, 3)).clamp(min=1e-3)
    return drawn.to(torch.uint8), float((10 * (255**2 / mse).log10()).mean())


@torch.no_grad()
def fold_statistics(vae: Any, latents: Tensor) -> None:
    """Make `latents` [N, 4, 16, 16] zero mean and unit deviation, without changing pictures.

    The shift and scale go into the 1×1 convolutions on both sides of the latents, so that
    ``scaling_factor`` can be 1.
    """
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    width = len(mean)
    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    encoder.weight[:width] /= deviation[:, None, None, None]
    encoder.bias[:width] = (encoder.bias[:width] - mean) / deviation
    encoder.bias[width:] -= 2 * deviation.log()  # the other half of its output is log variance
    decoder.bias += decoder.weight[:, :, 0, 0] @ mean
    decoder.weight *= deviation[None, :, None, None]


def spread(batch: int, total: int, generator: torch.Generator) -> Tensor:
    """Timesteps [batch] below `total`, stratified: one from each of `batch` equal ranges."""
    place = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return (place * total).long().clamp(max=total - 1)


def diffusion_loss(
    networks: Networks,
    latents: Tensor,
    captions: Tensor,
    generator: torch.Generator,
    batch: int,
) -> Tensor:
    """Mean square error of the predicted velocity, for U-Net and text encoder together: DDPM's
    Algorithm 1 on latents and a text.

    `latents` [N, 4, 16, 16], `captions` [N, V, L] token ids. One caption in ten is emptied, for
    classifier-free guidance; timesteps are stratified over the batch.
    """
    device, scheduler = latents.device, networks.scheduler
    total = scheduler.config.num_train_timesteps
    pick = torch.randint(len(latents), (batch,), generator=generator)
    caption = torch.randint(captions.shape[1], (batch,), generator=generator)
    emptied = torch.rand(batch, 1, generator=generator) < 0.1
    t = spread(batch, total, generator).to(device)
    noise = torch.randn(batch, *latents.shape[1:], generator=generator).to(device)
    empty = networks.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    ids = torch.where(emptied, empty, captions[pick, caption]).to(device)
    x = latents[pick.to(device)]
    noisy, target = scheduler.add_noise(x, noise, t), scheduler.get_velocity(x, noise, t)
    with autocast(device):
        text = networks.text_encoder(ids)[0]
        velocity = networks.unet(noisy, t, text).sample
    return functional.mse_loss(velocity.float(), target)


def pipeline(networks: Networks) -> Any:
    """The networks as a diffusers pipeline; weights are shared, not copied."""
    build: Any = StableDiffusionPipeline
    pipe = build(
        vae=networks.vae,
        text_encoder=networks.text_encoder,
        tokenizer=networks.tokenizer,
        unet=networks.unet,
        scheduler=networks.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(networks: Networks, prompts: Sequence[str], seed: int = 0) -> list[Image.Image]:
    """One picture of each prompt: 15 DDIM steps, guidance 3.5."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    pictures: list[Image.Image] = pipeline(networks)(
        list(prompts), num_inference_steps=15, guidance_scale=3.5, generator=generators
    ).images
    return pictures


def as_images(pictures: Tensor) -> list[Image.Image]:
    """uint8 [N, 3, Y, X] as Pillow's pictures."""
    return [Image.fromarray(array) for array in pictures.permute(0, 2, 3, 1).cpu().numpy()]


def write_sheet(path: Path, pictures: Sequence[Image.Image], labels: Sequence[str]) -> None:
    """Write the pictures at twice their size in rows of eight, each above its label, as a PNG."""
    width, height, columns = 128, 144, 8
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = index % columns * width, index // columns * height
        sheet.paste(picture.resize((width, width), Image.Resampling.NEAREST), (x, y))
        pen.text((x + 4, y + width), label[:20], "black")
    unfinished = path.with_suffix(".unfinished")
    sheet.save(unfinished, "PNG", optimize=True)
    os.replace(unfinished, path)


def write_folder(networks: Networks, folder: Path) -> None:
    """Save float16 weights as a diffusers folder; replaces an existing one."""
    halves = {
        name: deepcopy(getattr(networks, name)).half() for name in ("text_encoder", "vae", "unet")
    }
    half = Networks(networks.tokenizer, scheduler=networks.scheduler, **halves)
    with replacing(folder) as unfinished:
        pipeline(half).save_pretrained(unfinished)
        # transformers 5 saves only tokenizer.json; older versions read vocab.json and merges.txt
        shutil.copytree(DEMO_FOLDER / "tokenizer", unfinished / "tokenizer", dirs_exist_ok=True)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A path to write a new folder to, which replaces `folder` after the block."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
