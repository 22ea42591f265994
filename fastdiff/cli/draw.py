"""generate: one picture."""

import inspect
import math
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli.options import Device, Dtype, Seed, Side, Steps, app, at_least, load_pipe
from fastdiff.errors import UserError
from fastdiff.recipes import denoiser


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="The picture's file, .png or what else Pillow writes.")],
    steps: Steps = 25,
    seed: Seed = 0,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="How closely to follow the prompt; the pipeline's own if absent, 4 for the demo."
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    pipe: Annotated[Path | None, typer.Option(help="A pipeline's folder, not the demo.")] = None,
    height: Side = None,
    width: Side = None,
    dtype: Dtype = None,
    device: Device = None,
    eager: Annotated[bool, typer.Option("--eager", help="Without fastdiff.")] = False,
) -> None:
    """Draw one picture."""
    at_least("--steps", steps, 1)
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise UserError(f"--guidance-scale is {guidance_scale}; give a number, such as 4")
    from fastdiff.bench.pipelines import check_device, check_dtype, check_size, check_steps
    from fastdiff.bench.progress import step_bar
    from fastdiff.bench.room import room
    from fastdiff.written import check_writable, write_file

    check_writable(out, "--out")
    kind = _format(out)
    device = check_device(device)
    painter = load_pipe(pipe, check_dtype(dtype, device), device)
    check_steps(painter, steps)
    height, width = check_size(painter, height, width)
    known = inspect.signature(painter.__call__).parameters
    if negative_prompt is not None and "negative_prompt" not in known:
        raise UserError(f"--negative-prompt: a {type(painter).__name__} takes none; leave it out")
    if guidance_scale is None:
        guidance_scale = known["guidance_scale"].default if pipe else 4.0
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

    with room(painter, height, width, device):
        drawn = painter(
            prompt,
            generator=torch.Generator("cpu").manual_seed(seed),
            **{name: value for name, value in wanted.items() if value is not None},
        ).images
        image = _picture(painter, drawn, guidance_scale)
    encoded = _encoded(image, out, kind)
    write_file(out, lambda path: path.write_bytes(encoded))
    print(out)


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
