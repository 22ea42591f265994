"""generate: a picture for each prompt."""

import inspect
import math
import re
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli.options import (
    Config,
    Device,
    Dtype,
    Lora,
    Pipeline,
    Scheduler,
    Seed,
    Side,
    Steps,
    Variant,
    app,
    at_least,
    source_of,
)
from fastdiff.errors import UserError
from fastdiff.recipes import denoiser


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[
        list[str], typer.Option(help="What to draw. Repeat it for a picture of each.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="The picture's file, a .png or another format of Pillow's. Several prompts make"
            " NAME-1.png, NAME-2.png and so on, counted on from those that are there already."
        ),
    ],
    pipeline: Pipeline = None,
    steps: Steps = 25,
    seed: Seed = 0,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="How closely to follow the prompt. Default: the pipeline's own, 4 for the demo."
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    scheduler: Scheduler = None,
    lora: Lora = None,
    variant: Variant = None,
    config: Config = None,
    height: Side = None,
    width: Side = None,
    dtype: Dtype = None,
    device: Device = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="Draw with diffusers alone, without fastdiff.")
    ] = False,
) -> None:
    """Draw a picture of each prompt, all from the same seed."""
    at_least("--steps", steps, 1)
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise UserError(f"--guidance-scale is {guidance_scale}; give a number, such as 4")
    from fastdiff.bench.enlarged import enlarges
    from fastdiff.bench.pipelines import check_device, check_dtype, check_size, check_steps
    from fastdiff.bench.progress import step_bar
    from fastdiff.bench.room import room
    from fastdiff.bench.source import opened, placed
    from fastdiff.written import check_writable, write_file

    check_writable(out, "--out")
    kind = _format(out)
    device = check_device(device)
    painter = opened(source_of(context), check_dtype(dtype, device), device).to(device)
    check_steps(painter, steps)
    if enlarges(painter):
        raise UserError(
            f"a {type(painter).__name__} enlarges a picture, and draw gives it none; call it from"
            " Python"
        )
    height, width = check_size(painter, height, width)
    known = inspect.signature(painter.__call__).parameters
    if negative_prompt is not None and "negative_prompt" not in known:
        raise UserError(f"--negative-prompt: a {type(painter).__name__} takes none; leave it out")
    if guidance_scale is None:
        is_demo = placed(pipeline) is None
        guidance_scale = 4.0 if is_demo else known["guidance_scale"].default
    wanted = {
        "negative_prompt": negative_prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "output_type": "np",
    }
    if not eager:
        import fastdiff

        fastdiff.compile(painter)
    painter.progress_bar = step_bar
    import torch

    for text, place in zip(prompt, _places(out, len(prompt)), strict=True):
        with room(painter, height, width, device):
            drawn = painter(
                text,
                generator=torch.Generator("cpu").manual_seed(seed),
                **{name: value for name, value in wanted.items() if value is not None},
            ).images
            image = _picture(painter, drawn, guidance_scale)
        encoded = _encoded(image, place, kind)
        write_file(place, lambda path, encoded=encoded: path.write_bytes(encoded))  # type: ignore[misc]
        print(place)


def _places(out: Path, count: int) -> list[Path]:
    """`out` for one picture; for several its name with numbers, none of which is taken yet."""
    if count == 1:
        return [out]
    numbered = re.compile(rf"{re.escape(out.stem)}-(\d+)")
    names = [one.stem for one in out.parent.iterdir() if one.suffix == out.suffix]
    last = max((int(found[1]) for name in names if (found := numbered.fullmatch(name))), default=0)
    return [out.with_name(f"{out.stem}-{last + 1 + at}{out.suffix}") for at in range(count)]


def _format(out: Path) -> str:
    """Pillow's name of the format that `out` ends in; UserError unless it takes colours."""
    from PIL import Image

    Image.init()
    suffix = out.suffix.lower()
    kind = Image.registered_extensions().get(suffix, "")
    try:
        Image.new("RGB", (8, 8)).save(BytesIO(), kind)
    except (KeyError, OSError, ValueError):
        raise UserError(
            f"--out {out}: Pillow writes no {suffix or 'suffix-less'} file of colours; use .png"
        ) from None
    return kind


def _picture(painter: Any, drawn: Any, guidance_scale: float) -> Any:
    """The one picture of [1, H, W, 3] in [0, 1], as the pipeline itself makes it of them."""
    import numpy as np

    if not np.isfinite(drawn).all():
        dtype = denoiser(painter).dtype
        raise UserError(
            f"the picture holds numbers that are not finite, in {dtype} with guidance"
            f" {guidance_scale:g}; give a smaller --guidance-scale, or --dtype fp32"
        )
    return painter.image_processor.numpy_to_pil(drawn)[0]


def _encoded(image: Any, out: Path, kind: str) -> bytes:
    """The file's bytes: Pillow takes a disk that is full amid a file for one that is not."""
    file = BytesIO()
    try:
        image.save(file, kind)
    except (OSError, ValueError) as error:  # what a format cannot hold: 20000 pixels of .webp
        raise UserError(f"{out} cannot be written: {error}; use .png") from error
    return file.getvalue()
