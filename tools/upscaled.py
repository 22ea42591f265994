"""Draws the picture of an upscaler in docs/textbook.md, and says how near it is to the truth.

python -m tools.upscaled docs/upscaled.png [FONT]

The emoji are those of Noto Color Emoji that training leaves out: eight are shown, all are measured.
"""

import sys
from pathlib import Path
from statistics import mean

from skimage.metrics import structural_similarity
from torch import Tensor

import fastdiff
from fastdiff.bench.receipt import psnr
from fastdiff.demo import load_upscaler
from tools.train_demo import data, upscale
from tools.train_demo.unconditional import shrunk


def nearness(pictures: Tensor, truth: Tensor) -> str:
    """Mean PSNR and SSIM of uint8 pictures [N, 3, Y, X]."""
    pairs = [
        (one.permute(1, 2, 0).numpy() / 255, other.permute(1, 2, 0).numpy() / 255)
        for one, other in zip(pictures, truth, strict=True)
    ]
    alike = mean(structural_similarity(*pair, channel_axis=-1, data_range=1.0) for pair in pairs)
    return f"{mean(psnr(*pair) for pair in pairs):.2f} dB, SSIM {alike:.3f}"


def main(out: Path, font: Path | None) -> None:
    unseen = data.left_out(data.read_glyphs(data.find_font(font)))
    pipe = fastdiff.compile(load_upscaler())
    pipe.set_progress_bar_config(disable=True)
    upscale.write_sheet(pipe, unseen, out)
    small, names = shrunk(unseen.images), [own[0] for own in unseen.names]
    print(f"{len(unseen)} pictures, mean")
    print("bicubic ", nearness(upscale.bicubic(small), unseen.images))
    print("upscaler", nearness(upscale.enlarged(pipe, small, names), unseen.images))


if __name__ == "__main__":
    target, *rest = sys.argv[1:]
    main(Path(target), Path(rest[0]) if rest else None)
