"""Draws the README's pictures: four prompts, eager above, fastdiff below, with the same seeds.

python tools/pictures.py docs/pictures.png
"""

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

import fastdiff
from fastdiff.demo import PROMPTS

SIDE, ZOOM, LABEL, LEFT = 64, 2, 18, 60


def row(pipe: Any) -> list[Image.Image]:
    return [
        pipe(
            prompt,
            num_inference_steps=25,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        for seed, prompt in enumerate(PROMPTS)
    ]


def main(out: Path) -> None:
    pipe = fastdiff.load_demo()
    pipe.set_progress_bar_config(disable=True)
    rows = {"eager": row(pipe), "fastdiff": row(fastdiff.compile(pipe))}
    cell = SIDE * ZOOM
    sheet = Image.new("RGB", (LEFT + cell * len(PROMPTS), LABEL + cell * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(PROMPTS):
        draw.text((LEFT + column * cell + 4, 3), prompt, fill="black")
    for line, (name, images) in enumerate(rows.items()):
        draw.text((4, LABEL + line * cell + cell // 2), name, fill="black")
        for column, image in enumerate(images):
            sheet.paste(
                image.resize((cell, cell), Image.Resampling.NEAREST),
                (LEFT + column * cell, LABEL + line * cell),
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
