"""The command line: parse, call one function, print. Data on stdout, progress on stderr."""

import json as json_module
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.errors import UserError

app = typer.Typer(
    help="Makes diffusers pipelines fast without changing what they draw.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Folder = Annotated[Path | None, typer.Argument(help="A diffusers pipeline; the demo if absent.")]
Steps = Annotated[int, typer.Option(help="Denoising steps.")]
Seed = Annotated[int, typer.Option(help="Same seed, same picture.", min=0, max=2**63 - 1)]
Side = Annotated[int | None, typer.Option(help="Pixels; the pipeline's own if absent.")]
Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; fp32 on a CPU, else fp16.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")]
Preset = Annotated[str | None, typer.Option(help="sd15, sd21, sdxl or tiny.")]
Scale = Annotated[float, typer.Option(help="Preset's widths and picture, 0 to 1.")]


@app.command()
def bench(
    context: typer.Context,
    folder: Folder = None,
    preset: Preset = None,
    scale: Scale = 1.0,
    backends: Annotated[
        str, typer.Option(help="Comma-separated; eager is always run.")
    ] = "eager,channels_last,inductor,fastdiff",
    dtype: Dtype = None,
    device: Device = None,
    steps: Steps = 20,
    height: Side = None,
    width: Side = None,
    rounds: Annotated[int, typer.Option(help="Pictures timed per backend.")] = 15,
    seed: Seed = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write fastdiff.bench/1 here.")
    ] = None,
) -> None:
    """Steps per second of each backend side by side, with the quality receipt."""
    _at_least("--steps", steps, 1)
    _at_least("--rounds", rounds, 2)
    from fastdiff.bench.backends import choose
    from fastdiff.bench.machine import commit, machine, versions
    from fastdiff.bench.pipelines import check_device, check_dtype, check_size, check_steps
    from fastdiff.bench.progress import status
    from fastdiff.bench.report import show
    from fastdiff.bench.results import Result, check_writable, to_json, write_file
    from fastdiff.bench.run import Settings
    from fastdiff.bench.run import bench as run

    if json_file:
        check_writable(json_file, "--json")
    names = choose(backends)
    device = check_device(device)
    torch_dtype = check_dtype(dtype, device)
    pipe, case = _choose(folder, preset, scale, torch_dtype, device)
    check_steps(pipe, steps)
    height, width = check_size(pipe, height, width)
    kind = str(torch_dtype).removeprefix("torch.")
    settings = Settings(
        case=f"{case}, {kind}, {device}, {width}×{height}, {steps} steps",
        backends=names,
        device=device,
        steps=steps,
        height=height,
        width=width,
        rounds=rounds,
        seed=seed,
        prompt="red heart",
    )
    with status() as log:
        rows = tuple(run(pipe, settings, log))
    command = shlex.join(["fastdiff", *context.obj])
    result = Result(machine(), versions(), commit(), command, rows)
    if json_file:
        write_file(json_file, lambda path: path.write_text(to_json(result), encoding="utf-8"))
    show(result)
    if any(row.failed for row in rows):
        raise typer.Exit(1)


@app.command()
def count(
    context: typer.Context,
    folder: Folder = None,
    preset: Preset = None,
    scale: Scale = 1.0,
    dtype: Dtype = None,
    device: Device = None,
    steps: Annotated[int, typer.Option(help="Of one picture; another has one less.")] = 5,
    height: Side = None,
    width: Side = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write fastdiff.counts/1 here.")
    ] = None,
) -> None:
    """Launches, bytes and FLOPs per step and per image, eager and with fastdiff: no timing."""
    _at_least("--steps", steps, 2)
    from fastdiff.bench import counters
    from fastdiff.bench.machine import commit, machine, versions
    from fastdiff.bench.pipelines import check_device, check_dtype, check_size, check_steps
    from fastdiff.bench.progress import status
    from fastdiff.bench.report import show_counts
    from fastdiff.bench.results import check_writable, write_file

    if json_file:
        check_writable(json_file, "--json")
    device = check_device(device)
    torch_dtype = check_dtype(dtype, device)
    with status() as log:
        log("loading")
        pipe, case = _choose(folder, preset, scale, torch_dtype, device)
        check_steps(pipe, steps)
        height, width = check_size(pipe, height, width)
        rows = tuple(counters.count_pipe(pipe.to(device), steps, height, width, log))
    case = f"{case}, {str(torch_dtype).removeprefix('torch.')}, {device}, {width}×{height}"
    command = shlex.join(["fastdiff", *context.obj])
    result = counters.Result(case, machine(), versions(), commit(), command, rows)
    if json_file:
        text = counters.to_json(result)
        write_file(json_file, lambda path: path.write_text(text, encoding="utf-8"))
    show_counts(result)


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
    _at_least("--steps", steps, 1)
    from PIL import Image

    from fastdiff.bench.pipelines import check_device, check_dtype, check_size, check_steps
    from fastdiff.bench.progress import step_bar
    from fastdiff.bench.results import check_writable, write_file

    check_writable(out, "--out")
    Image.init()
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise UserError(
            f"--out {out}: Pillow writes no {out.suffix or 'suffix-less'} file; use .png"
        )
    device = check_device(device)
    painter = _load(pipe, check_dtype(dtype, device), device)
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


@app.command()
def env(
    json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Versions and machine, to paste into an issue."""
    from fastdiff.bench.machine import commit, machine, native, versions

    facts = {"commit": commit()} | versions() | machine()
    gpu = facts.pop("gpu")
    facts |= {f"gpu {key}": value for key, value in gpu.items()} if gpu else {"gpu": None}
    compiled = native()
    facts |= {"fastdiff._C": compiled["isa"] or compiled["note"]}
    if json:
        print(json_module.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        print(f"- {name}: {'none' if value is None else value}")


@app.command()
def inspect(
    arch: Annotated[
        list[int] | None, typer.Option(help="80, 90, 120, …; every one we know if absent.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As a JSON list.")] = False,
) -> None:
    """What each GPU kernel compiles to: registers, spills, shared memory, tensor cores."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    try:
        from fastdiff.kernels.inspect import SHARED_LIMIT, table
    except ImportError as error:
        raise UserError(f"inspect needs triton ({error}); pip install fastdiff[gpu]") from error
    if unknown := set(arch or ()) - set(SHARED_LIMIT):
        known = ", ".join(map(str, SHARED_LIMIT))
        raise UserError(f"--arch is {min(unknown)}; choose from {known}")
    rows = [asdict(row) for row in table(arch or None)]
    if json:
        print(json_module.dumps(rows, indent=1))
        return
    shown = Table(*(rows[0] if rows else ()), pad_edge=False)
    for row in rows:
        shown.add_row(*(str(value) for value in row.values()))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    console.print(shown)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments`, the process's own if None, and exit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Loading bars and advice of the libraries below are not what was asked for.
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        app(arguments, prog_name="fastdiff", obj=arguments)
    except UserError as error:
        from rich.console import Console

        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"fastdiff: {error}", style="red", markup=False
        )
        sys.exit(2)


def _choose(
    folder: Path | None, preset: str | None, scale: float, dtype: Any, device: str
) -> tuple[Any, str]:
    """The pipeline of a folder (on the CPU) or a preset (on `device`), else the demo; its name."""
    if folder and preset:
        raise UserError(f"got the folder {folder} and --preset {preset}; give one of them")
    if scale != 1.0 and not preset:
        raise UserError("--scale goes with --preset; a folder's widths are what they are")
    if not preset:
        return _load(folder, dtype, "cpu"), folder.name if folder else "demo"
    from fastdiff.bench.presets import build

    return build(preset, scale, dtype, device), f"{preset} scale {scale:g}"


def _load(folder: Path | None, dtype: Any, device: str) -> Any:
    """The pipeline in `folder`, or the demo."""
    from fastdiff.bench.pipelines import load

    try:
        if folder:
            return load(folder, dtype, device)
        from fastdiff.demo import load_demo

        return load_demo(dtype, device)
    except ImportError as error:
        raise UserError(f"{error}; pip install fastdiff[diffusers]") from error


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{option} is {value}; give at least {least}")
