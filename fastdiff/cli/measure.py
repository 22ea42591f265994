"""bench and count: how fast, and what each step launches."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import (
    Config,
    Device,
    Dtype,
    Json,
    Lora,
    Pipeline,
    Preset,
    Scale,
    Scheduler,
    Seed,
    Side,
    Steps,
    Variant,
    app,
    at_least,
    source_of,
    was_given,
)
from fastdiff.errors import UserError


@app.command()
def bench(
    context: typer.Context,
    pipeline: Pipeline = None,
    preset: Preset = None,
    scale: Scale = 1.0,
    scheduler: Scheduler = None,
    lora: Lora = None,
    variant: Variant = None,
    config: Config = None,
    backends: Annotated[
        str,
        typer.Option(
            help="The backends to run, separated by commas. eager, which the others are compared"
            " with, always runs."
        ),
    ] = "eager,channels_last,inductor,fastdiff",
    dtype: Dtype = None,
    device: Device = None,
    steps: Steps = 20,
    height: Side = None,
    width: Side = None,
    rounds: Annotated[
        int, typer.Option(help="Number of pictures that are timed for each backend.")
    ] = 15,
    seed: Seed = 0,
    engines: Annotated[
        Path | None, typer.Option(help="The folder that fastdiff export made from this pipeline.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Time the backends side by side, and compare what each computes with float64.

    Exits with 1 if a backend's error is above its limit, or if one named in --backends cannot run.
    """
    at_least("--steps", steps, 1)
    at_least("--rounds", rounds, 2)
    if pipeline == "kernels" and not Path(pipeline).exists():
        raise UserError("bench times pipelines; run fastdiff compare kernels or pytest benchmarks")
    from fastdiff.bench.backends import ON_ENGINES, choose
    from fastdiff.bench.machine import commit, machine, native, versions
    from fastdiff.bench.pipelines import check_device, check_dtype, check_size, check_steps
    from fastdiff.bench.progress import status
    from fastdiff.bench.report import show
    from fastdiff.bench.results import Result, now, to_json
    from fastdiff.bench.room import room
    from fastdiff.bench.run import Settings
    from fastdiff.bench.run import bench as run
    from fastdiff.bench.source import opened
    from fastdiff.written import afterwards, check_writable, so_far

    if json_file:
        check_writable(json_file, "--json")
    names = choose(backends)
    asked = names if was_given(context, "backends") else ()
    if "tensorrt" in names and not engines:
        raise UserError(
            "--backends tensorrt needs --engines; give the folder that fastdiff export --trt wrote"
        )
    if engines:
        from fastdiff.compiler.engines import check_folder

        if not set(ON_ENGINES) & set(names):
            raise UserError(
                f"--engines needs --backends {', '.join(ON_ENGINES[:-1])} or {ON_ENGINES[-1]}"
            )
        check_folder(engines)
    device = check_device(device)
    torch_dtype = check_dtype(dtype, device)
    # a preset's random weights depend on the device that draws them; engines were made on the CPU
    source = source_of(context)
    pipe = opened(source, torch_dtype, "cpu" if engines else device)
    check_steps(pipe, steps)
    height, width = check_size(pipe, height, width)
    kind = str(torch_dtype).removeprefix("torch.")
    size = f"{width}×{height}" if height else "an embedding"
    settings = Settings(
        case=f"{source.name}, {kind}, {device}, {size}, {steps} steps",
        backends=names,
        asked=asked,
        device=device,
        steps=steps,
        height=height,
        width=width,
        rounds=rounds,
        seed=seed,
        prompt="red heart",
        engines=engines,
    )
    command = shlex.join(["fastdiff", *context.obj])
    unfinished = Result(machine(), versions(), commit(), command, (), True, created=now())
    with status() as log, room(pipe, height, width, device), so_far(json_file) as keep:
        rows = run(
            pipe,
            settings,
            log,
            lambda rows: keep(to_json(replace(unfinished, rows=tuple(rows)))),
        )
    result = replace(unfinished, rows=tuple(rows), incomplete=False)
    with afterwards(json_file, lambda: to_json(result)):
        show(result, native()["note"] if device == "cpu" else None)
    if any(row.failed or (row.unavailable and row.backend in asked) for row in rows):
        raise typer.Exit(1)


@app.command()
def count(
    context: typer.Context,
    pipeline: Pipeline = None,
    preset: Preset = None,
    scale: Scale = 1.0,
    scheduler: Scheduler = None,
    lora: Lora = None,
    variant: Variant = None,
    config: Config = None,
    dtype: Dtype = None,
    device: Device = None,
    steps: Annotated[
        int,
        typer.Option(
            help="Denoising steps of one picture. A second picture with one step less shows what"
            " a step costs."
        ),
    ] = 5,
    height: Side = None,
    width: Side = None,
    draw: Annotated[
        bool,
        typer.Option(
            "--draw", help="Also draw pictures, and count recordings, compilations and peak memory."
        ),
    ] = False,
    json_file: Json = None,
) -> None:
    """Count the launches, bytes and FLOPs of a step and of a picture, eager and with fastdiff.

    Nothing is timed, so the numbers are the same on a busy machine.
    """
    at_least("--steps", steps, 2)
    from fastdiff.bench import counters
    from fastdiff.bench.machine import commit, machine, versions
    from fastdiff.bench.pipelines import check_device, check_dtype, check_size, check_steps
    from fastdiff.bench.progress import status
    from fastdiff.bench.report import show_counts
    from fastdiff.bench.room import room
    from fastdiff.bench.source import opened
    from fastdiff.written import afterwards, check_writable

    if json_file:
        check_writable(json_file, "--json")
    device = check_device(device)
    torch_dtype = check_dtype(dtype, device)
    source = source_of(context)
    with status() as log:
        log("loading")
        pipe = opened(source, torch_dtype, device)
        check_steps(pipe, steps)
        height, width = check_size(pipe, height, width)
        with room(pipe, height, width, device):
            rows = tuple(counters.count_pipe(pipe.to(device), steps, height, width, log, draw))
    case = f"{source.name}, {str(torch_dtype).removeprefix('torch.')}, {device}, {width}×{height}"
    command = shlex.join(["fastdiff", *context.obj])
    result = counters.Result(case, machine(), versions(), commit(), command, rows)
    with afterwards(json_file, lambda: counters.to_json(result)):
        show_counts(result)
