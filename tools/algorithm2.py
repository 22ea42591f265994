"""Draws the pictures of docs/textbook.md: DDPM's Algorithm 2, run by fastdiff.

python -m tools.algorithm2 [FOLDER] docs/unconditional.png

FOLDER holds a DDPMPipeline; without it, the one that comes with the package. Above: pictures of the
first seeds, not selected. Below: what one of them was at some of the timesteps.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline
from PIL import Image, ImageDraw
from torch import Tensor

import fastdiff
from fastdiff.demo import UNCONDITIONAL_FOLDER

COLUMNS, ROWS, CELL, LABEL = 8, 2, 80, 16
SHOWN = (999, 600, 400, 300, 200, 100, 50, 0)
"""The timesteps after whose step the picture is shown."""


def sampled(pipe: Any, count: int) -> tuple[Tensor, dict[int, Tensor]]:
    """Algorithm 2: pictures [count, 3, Y, X] in -1 … 1, and the first of them at SHOWN."""
    side = pipe.unet.config.sample_size
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    x = torch.cat([torch.randn(1, 3, side, side, generator=g) for g in generators])
    seen = {}
    for t in pipe.scheduler.timesteps.tolist():  # 999, …, 0
        with torch.no_grad():
            noise = pipe.unet(x, t).sample
        x = pipe.scheduler.step(noise, t, x, generator=generators).prev_sample
        if t in SHOWN:
            seen[t] = x[0]
    return x, seen


def picture(x: Tensor) -> Image.Image:
    levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy()).resize(
        (CELL, CELL), Image.Resampling.NEAREST
    )


def main(folder: Path, out: Path) -> None:
    pipe = fastdiff.compile(DDPMPipeline.from_pretrained(folder))
    pictures, seen = sampled(pipe, COLUMNS * ROWS)
    sheet = Image.new("RGB", (COLUMNS * CELL, (ROWS + 1) * CELL + 2 * LABEL), "white")
    for index, x in enumerate(pictures):
        sheet.paste(picture(x), (index % COLUMNS * CELL, index // COLUMNS * CELL))
    top, pen = ROWS * CELL + LABEL, ImageDraw.Draw(sheet)
    for column, t in enumerate(SHOWN):
        sheet.paste(picture(seen[t]), (column * CELL, top))
        pen.text((column * CELL + 4, top + CELL + 2), f"t = {t}", fill="black")
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    *given, target = sys.argv[1:]
    main(Path(given[0]) if given else UNCONDITIONAL_FOLDER, Path(target))
