"""``python -m tools.train_demo --minutes 120 --out FOLDER``: trains the demo's weights from a
font.

It is Algorithm 1 of DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239): pick pictures,
timesteps and noise, and descend the square error of the prediction. The demo's U-Net sees latents
and a text, and predicts the velocity. With ``--unconditional`` the algorithm is as printed: pixels,
no text, and the noise is predicted; with ``--upscale`` the U-Net sees a small picture, too, and
enlarges it by four. Drawing is Algorithm 2, which is what fastdiff makes fast.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import fastdiff
from fastdiff.demo import upscaler
from tools.train_demo import data, loop, networks, unconditional, upscale

AUTOENCODER_SHARE = 0.3  # of the minutes; the rest trains U-Net and text encoder
TICKS_PER_SHEET = 10
SHEET = (  # the last four are colour and object pairs that training never shows
    "red heart", "grinning face", "dog face", "pizza", "blue circle", "sunflower", "rocket",
    "smiling face with sunglasses", "penguin", "green frog", "rainbow", "soccer ball",
    "purple star", "blue apple", "green balloon", "purple car",
)  # fmt: skip


def train_autoencoder(
    made: networks.Networks, images: Tensor, minutes: float, out: Path, seed: int
) -> tuple[loop.Row, ...]:
    """Phase one; at its end the latents are normalised to zero mean and unit deviation."""

    def watch(rows: tuple[loop.Row, ...]) -> None:
        print_row("autoencoder", rows[-1])
        if len(rows) % TICKS_PER_SHEET == 0:
            some = images[:: len(images) // 8][:8]
            pairs = torch.cat([some, networks.reconstruct(made.vae, some)[0]])
            labels = ["picture"] * len(some) + ["reconstruction"] * len(some)
            networks.write_sheet(out / "autoencoder.png", networks.as_images(pairs), labels)

    def loss(generator: torch.Generator) -> Tensor:
        return networks.autoencoder_loss(made.vae, images, generator, batch=16)

    phase = loop.Phase("autoencoder", made.vae, loss, lr=2e-3)
    # once the U-Net has begun, its latents must not change, even if a resumed run has more minutes
    begun = (out / "unet.safetensors").exists()
    rows = loop.train(phase, loop.steps(1) if begun else loop.minutes(minutes), out, seed, watch)
    networks.fold_statistics(made.vae, networks.encode(made.vae, images))
    print(f"autoencoder: {networks.reconstruct(made.vae, images)[1]:.1f} dB mean", flush=True)
    return rows


def train_unet(
    made: networks.Networks,
    latents: Tensor,
    captions: Tensor,
    batch: int,
    minutes: float,
    out: Path,
    seed: int,
) -> tuple[loop.Row, ...]:
    """Phase two: train U-Net and text encoder together, on latents that no longer change."""

    def watch(rows: tuple[loop.Row, ...]) -> None:
        print_row("unet", rows[-1])
        if len(rows) % TICKS_PER_SHEET == 0:
            networks.write_sheet(out / "sheet.png", networks.draw(made, SHEET), SHEET)

    def loss(generator: torch.Generator) -> Tensor:
        return networks.diffusion_loss(made, latents, captions, generator, batch)

    both = nn.ModuleDict({"unet": made.unet, "text_encoder": made.text_encoder})
    phase = loop.Phase("unet", both, loss, lr=1e-3)
    return loop.train(phase, loop.minutes(minutes), out, seed, watch)


def train_demo(
    names: tuple[tuple[str, ...], ...],
    images: Tensor,
    batch: int,
    minutes: float,
    out: Path,
    seed: int,
) -> dict[str, tuple[loop.Row, ...]]:
    """Both phases; saves the pipeline."""
    made = networks.untrained(seed, images.device)
    first = train_autoencoder(made, images, AUTOENCODER_SHARE * minutes, out, seed)
    latents = networks.encode(made.vae, images)
    captions = data.captions(names, made.tokenizer)
    rest = (1 - AUTOENCODER_SHARE) * minutes
    second = train_unet(made, latents, captions, batch, rest, out, seed)
    networks.write_sheet(out / "sheet.png", networks.draw(made, SHEET), SHEET)
    networks.write_folder(made, out / "pipeline")
    return {"autoencoder": first, "unet": second}


def train_unconditional(
    images: Tensor, batch: int, minutes: float, out: Path, seed: int
) -> tuple[loop.Row, ...]:
    """A U-Net that draws without a text; saves its pipeline."""
    unet = unconditional.untrained(seed, images.device)

    def watch(rows: tuple[loop.Row, ...]) -> None:
        print_row("unconditional", rows[-1])
        if len(rows) % TICKS_PER_SHEET == 0:
            unconditional.write_sheet(unet, out / "sheet.png")

    small = unconditional.shrunk(images)
    rows = unconditional.train(unet, small, loop.minutes(minutes), out, seed, batch, watch)
    unconditional.write_sheet(unet, out / "sheet.png")
    unconditional.write_folder(unet, out / "pipeline")
    return rows


def train_upscaler(
    pictures: data.Pictures,
    unseen: data.Pictures,
    batch: int,
    minutes: float,
    out: Path,
    seed: int,
    device: str,
) -> tuple[loop.Row, ...]:
    """A U-Net that enlarges, with the demo's other networks as they are; saves it alone."""
    demo = fastdiff.load_demo(device=device)
    known = upscale.pairs(demo, pictures, seed)
    pipe = upscaler(demo, upscale.untrained(seed, torch.device(device)))
    pipe.set_progress_bar_config(disable=True)

    def watch(rows: tuple[loop.Row, ...]) -> None:
        print_row("upscale", rows[-1])
        if len(rows) % TICKS_PER_SHEET == 0:
            upscale.write_sheet(pipe, unseen, out / "sheet.png")

    rows = upscale.train(pipe, known, loop.minutes(minutes), out, seed, batch, watch)
    upscale.write_sheet(pipe, unseen, out / "sheet.png")
    upscale.write_folder(pipe.unet, out / "pipeline")
    return rows


def print_row(phase: str, row: loop.Row) -> None:
    print(
        f"{phase:<11} step {row.step:>6}  {row.seconds / 60:6.1f} min  "
        f"loss {row.loss:.4f}  lr {row.lr:.1e}",
        flush=True,
    )


command = typer.Typer(add_completion=False)


@command.command()
def main(
    out: Annotated[Path, typer.Option(help="folder for checkpoints, sheets and the pipeline")],
    minutes: Annotated[float, typer.Option(min=0.1, help="of training, both phases")] = 120,
    font: Annotated[Path | None, typer.Option(help="Noto Color Emoji; else ask fontconfig")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the checkpoints")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="of the U-Net; 256 suits a GPU")] = 48,
    seed: Annotated[int, typer.Option(help="of the first weights and every draw")] = 0,
    without_text: Annotated[
        bool, typer.Option("--unconditional", help="a UNet2DModel that draws from noise alone")
    ] = False,
    enlarging: Annotated[
        bool, typer.Option("--upscale", help="a U-Net that enlarges by four, beside the demo")
    ] = False,
) -> None:
    """Train the demo pipeline from the Noto Color Emoji font; the run can be killed and resumed."""
    if not resume and list(out.glob("*.safetensors")):
        raise typer.BadParameter(f"{out} holds checkpoints: add --resume or choose another --out")
    if without_text and enlarging:
        raise typer.BadParameter("got --unconditional and --upscale: choose one")
    try:
        glyphs = dict(data.read_glyphs(data.find_font(font)))
        pictures = data.pictures(glyphs.items())
        unseen = data.left_out(glyphs.items()) if enlarging else None
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{error}; pip install 'fastdiff-engine[train]'") from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(pictures)} pictures, {device}, {torch.get_num_threads()} threads", flush=True)

    images = pictures.images.to(device)
    rows: dict[str, tuple[loop.Row, ...]]
    if without_text:
        rows = {"unconditional": train_unconditional(images, batch, minutes, out, seed)}
    elif unseen:
        rows = {"upscale": train_upscaler(pictures, unseen, batch, minutes, out, seed, device)}
    else:
        rows = train_demo(pictures.names, images, batch, minutes, out, seed)
    curves = {phase: [asdict(row) for row in own] for phase, own in rows.items()}
    (out / "curves.json").write_text(json.dumps(curves, indent=1))
    print(f"wrote {out / 'pipeline'} and {out / 'sheet.png'}")


if __name__ == "__main__":
    command()
