"""generate: one picture."""

from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import Device, Dtype, Seed, Side, Steps, app, at_least, load_pipe
from fastdiff.errors import UserError


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="The picture's file, .png or what else Pillow writes.")],
    steps: Steps = 25,
    seed: Seed = 0,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How closely to follow the prompt; 4 for the demo.")
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
    from PIL import Image

    from fastdiff.bench.pipelines import check_device, check_dtype, check_size, check_steps
    from fastdiff.bench.progress import step_bar
    from fastdiff.written import check_writable, write_file

    check_writable(out, "--out")
    Image.init()
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise UserError(
            f"--out {out}: Pillow writes no {out.suffix or 'suffix-less'} file; use .png"
        )
    device = check_device(device)
    painter = load_pipe(pipe, check_dtype(dtype, device), device)
    check_steps(painter, steps)
    height, width = check_size(painter, height, width)
    if guidance_scale is None:
        guidance_scale = 7.5 if pipe else 4.0  # diffusers' own default; the demo's best
    if not eager:
        import fastdiff

        fastdiff.compile(painter)
    painter.progress_bar = step_bar
    import torch

    image = painter(
        prompt,
        negative_prompt=negative_prompt,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        generator=torch.Generator("cpu").manual_seed(seed),
    ).images[0]
    write_file(out, image.save)
    print(out)
