"""generate: a picture for each prompt, or for each row of a file of prompts."""

import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdiff.cli.options import (
    Config,
    Device,
    Dtype,
    GpusPerWorker,
    Lora,
    Pipeline,
    RayAddress,
    Scheduler,
    Seed,
    Side,
    Steps,
    Variant,
    Workers,
    app,
    at_least,
    finite_guidance,
    source_of,
    was_given,
)
from fastdiff.errors import UserError

if TYPE_CHECKING:
    from fastdiff.bulk.painter import Painter
    from fastdiff.bulk.prompts import Row
    from fastdiff.runtime.ranks import Ranks


@app.command()
def generate(
    context: typer.Context,
    out: Annotated[
        Path,
        typer.Option(
            help="The picture's file, a .png or another format that Pillow writes. Several prompts"
            " make NAME-1.png, NAME-2.png and so on, after the highest number that exists. With"
            " --prompts: the folder for the pictures and manifest.jsonl."
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw. Repeat it to draw several pictures.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A .txt, .csv, .jsonl or .parquet file with a row for each picture; its columns:"
            " prompt, seed, steps, guidance, negative, size. After an interruption, run the same"
            " command again: it draws the missing pictures.",
        ),
    ] = None,
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
    parallel: Annotated[
        str | None,
        typer.Option(
            help="Under torchrun. guidance: each of two ranks computes one half of guidance; data:"
            " the ranks draw different pictures. Default: data with --prompts, else guidance."
        ),
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(
            help="With --prompts: pictures that a worker draws at the same time. Default: 4 on a"
            " GPU, 1 on a CPU.",
            min=1,
        ),
    ] = None,
    ray: RayAddress = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
) -> None:
    """Draw a picture for each prompt, all from the same seed, or for each row of a file."""
    at_least("--steps", steps, 1)
    finite_guidance(guidance_scale)
    if (prompts is None) == (not prompt):
        raise UserError("give --prompt, once or several times, or --prompts with a file")
    for name in ("ray", "workers", "capacity", "gpus_per_worker"):
        needed = "ray" if name == "gpus_per_worker" else "prompts"
        if was_given(context, name) and context.params[needed] is None:
            raise UserError(f"--{name.replace('_', '-')} needs --{needed}")
    if ray is not None and parallel is not None:
        raise UserError("got --parallel, which needs torchrun, and --ray; give one of them")
    from fastdiff.bulk.painter import Setup
    from fastdiff.bulk.prompts import Row

    setup = Setup(source_of(context), dtype, device, eager)
    own = Row(0, 0, "", seed, steps, guidance_scale, negative_prompt, width, height)
    if prompts is not None:
        from fastdiff.cli.bulk import draw_file, draw_file_by_ray

        if ray is not None:
            draw_file_by_ray(prompts, out, setup, own, ray, capacity, workers, gpus_per_worker)
        else:
            draw_file(prompts, out, setup, own, parallel, capacity, workers)
    else:
        _draw(prompt or [], out, setup, own, parallel)


def _draw(prompts: list[str], out: Path, setup: Any, own: "Row", parallel: str | None) -> None:
    """Draw each prompt as `own` says, into files named after `out`."""
    from dataclasses import replace

    from fastdiff.bench.progress import step_bar
    from fastdiff.bulk.painter import Painter
    from fastdiff.bulk.together import joined
    from fastdiff.compiler.options import GUIDANCE
    from fastdiff.written import check_writable, write_file

    check_writable(out, "--out")
    kind = _format(out)
    setup, ranks, shared = joined(setup, parallel, GUIDANCE)
    painter = Painter(setup)
    own = painter.complete(own)
    painter.compile(shared if ranks is not None and shared == GUIDANCE else None)
    first = ranks is None or ranks.rank == 0
    if first:
        painter.pipe.progress_bar = step_bar
    else:
        painter.pipe.set_progress_bar_config(disable=True)
    rows = [replace(own, prompt=text) for text in prompts]
    divided = ranks if shared != GUIDANCE else None
    for image, place in zip(_images(painter, rows, divided), _places(out, len(rows)), strict=True):
        if first:
            encoded = _encoded(image, place, kind)
            write_file(place, lambda path, encoded=encoded: path.write_bytes(encoded))  # type: ignore[misc]
            print(place)


def _images(painter: "Painter", rows: list["Row"], ranks: "Ranks | None") -> Iterator[Any]:
    """The rows' pictures. ranks: the processes that share the rows; None if this one draws all."""
    if ranks is None:
        yield from map(painter.draw, rows)
        return
    from PIL import Image

    from fastdiff.bulk.painter import attempts

    for drawn in attempts(painter, rows, ranks):
        if drawn.picture is None:
            raise UserError(str(drawn.error))
        yield Image.open(BytesIO(drawn.picture))


def _places(out: Path, count: int) -> list[Path]:
    """`out` for one picture; for several its name with numbers that no file has yet."""
    if count == 1:
        return [out]
    numbered = re.compile(rf"{re.escape(out.stem)}-(\d+)")
    names = [one.stem for one in out.parent.iterdir() if one.suffix == out.suffix]
    last = max((int(found[1]) for name in names if (found := numbered.fullmatch(name))), default=0)
    return [out.with_name(f"{out.stem}-{last + 1 + at}{out.suffix}") for at in range(count)]


def _format(out: Path) -> str:
    """Pillow's name of the format of `out`'s suffix; UserError if it cannot store colours."""
    from PIL import Image

    Image.init()
    suffix = out.suffix.lower()
    kind = Image.registered_extensions().get(suffix, "")
    try:
        Image.new("RGB", (8, 8)).save(BytesIO(), kind)
    except (KeyError, OSError, ValueError):
        raise UserError(
            f"--out {out}: Pillow cannot write colours as {suffix or 'a file without suffix'}; use"
            " .png"
        ) from None
    return kind


def _encoded(image: Any, out: Path, kind: str) -> bytes:
    """The file's bytes; encoded in memory because Pillow misses a disk that fills up mid-file."""
    file = BytesIO()
    try:
        image.save(file, kind)
    except (OSError, ValueError) as error:  # the format's limits, such as 16383 pixels of .webp
        raise UserError(f"{out} cannot be written: {error}; use .png") from error
    return file.getvalue()
