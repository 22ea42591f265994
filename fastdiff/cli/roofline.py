"""roofline: what each block of a pipeline costs a GPU at least."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import (
    Device,
    Folder,
    Preset,
    Scale,
    Side,
    Steps,
    app,
    at_least,
    choose_pipe,
)


@app.command()
def roofline(
    context: typer.Context,
    folder: Folder = None,
    gpu: Annotated[
        str | None, typer.Option(help="h200, rtx4090, …; the one here if absent.")
    ] = None,
    preset: Preset = None,
    scale: Scale = 1.0,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; bf16 on a CPU, else fp16.")
    ] = None,
    device: Device = None,
    steps: Steps = 20,
    height: Side = None,
    width: Side = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time each block on a CPU, too, for minutes.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Times that each block is timed.")] = 15,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write fastdiff.roofline/1 here.")
    ] = None,
) -> None:
    """Launches, FLOPs, bytes and floor of each block; the time it takes, where there is a GPU.

    A CPU counts bfloat16: it costs a GPU what float16 does, and our CPU kernels compute it.
    """
    at_least("--steps", steps, 1)
    at_least("--rounds", rounds, 2)
    from fastdiff.bench.gpus import gpu_named
    from fastdiff.bench.pipelines import check_device, check_dtype, check_size
    from fastdiff.bench.progress import status
    from fastdiff.bench.roofline import roofline as price
    from fastdiff.bench.roofline_table import to_json
    from fastdiff.bench.room import room
    from fastdiff.compiler import compile
    from fastdiff.written import afterwards, check_writable

    if json_file:
        check_writable(json_file, "--json")
    if gpu is not None:
        gpu_named(gpu)
    device = check_device(device)
    on_gpu = device.startswith("cuda")
    torch_dtype = check_dtype(dtype or (None if on_gpu else "bf16"), device)
    with status() as log:
        log("loading")
        pipe, case = choose_pipe(folder, preset, scale, torch_dtype, device)
        log("counting")
        with room(pipe, *check_size(pipe, height, width), device):
            result = price(
                compile(pipe.to(device)),  # for good: to restore a large network takes its time
                gpu,
                steps=steps,
                height=height,
                width=width,
                rounds=rounds if on_gpu or measure else 0,
            )
    if dtype is None and not on_gpu:
        why = "bfloat16, as no --dtype was given: it costs a GPU what float16 does"
        result = replace(result, assumed=(*result.assumed, why))
    command = shlex.join(["fastdiff", *context.obj])
    with afterwards(json_file, lambda: to_json(result, case, command)):
        print(result)
