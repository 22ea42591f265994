"""roofline: the least time that each block of a pipeline takes on a GPU."""

import shlex
from dataclasses import replace
from typing import Annotated

import typer

from fastdiff.cli.options import (
    Config,
    Device,
    Json,
    Lora,
    Pipeline,
    Preset,
    Scale,
    Scheduler,
    Side,
    Steps,
    Variant,
    app,
    at_least,
    source_of,
)


@app.command()
def roofline(
    context: typer.Context,
    pipeline: Pipeline = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="The GPU to compute for, such as h200 or rtx4090. Default: the GPU here."
        ),
    ] = None,
    preset: Preset = None,
    scale: Scale = 1.0,
    scheduler: Scheduler = None,
    lora: Lora = None,
    variant: Variant = None,
    config: Config = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="fp32, bf16 or fp16. Default: bf16 on a CPU, fp16 on a GPU."),
    ] = None,
    device: Device = None,
    steps: Steps = 20,
    height: Side = None,
    width: Side = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Without a GPU: time each block on the CPU, which takes minutes."
        ),
    ] = False,
    rounds: Annotated[int, typer.Option(help="How often each block is timed.")] = 15,
    json_file: Json = None,
) -> None:
    """Count the launches, FLOPs and bytes of each block, and the least time a GPU needs for it.

    If there is a GPU, each block is timed on it too. On a CPU, bfloat16 is counted: it costs a GPU
    the same as float16, and our CPU kernels compute it.
    """
    at_least("--steps", steps, 1)
    at_least("--rounds", rounds, 2)
    from fastdiff.bench.gpus import gpu_named
    from fastdiff.bench.pipelines import check_device, check_dtype, check_size
    from fastdiff.bench.progress import status
    from fastdiff.bench.roofline import roofline as price
    from fastdiff.bench.roofline_table import to_json
    from fastdiff.bench.room import room
    from fastdiff.bench.source import opened
    from fastdiff.compiler import compile
    from fastdiff.written import afterwards, check_writable

    if json_file:
        check_writable(json_file, "--json")
    if gpu is not None:
        gpu_named(gpu)
    device = check_device(device)
    on_gpu = device.startswith("cuda")
    torch_dtype = check_dtype(dtype or (None if on_gpu else "bf16"), device)
    source = source_of(context)
    with status() as log:
        log("loading")
        pipe = opened(source, torch_dtype, device)
        log("counting")
        with room(pipe, *check_size(pipe, height, width), device):
            result = price(
                compile(pipe.to(device)),  # never restored: that takes long for a large network
                gpu,
                steps=steps,
                height=height,
                width=width,
                rounds=rounds if on_gpu or measure else 0,
            )
    if dtype is None and not on_gpu:
        why = "bfloat16 because no --dtype was given: it costs a GPU the same as float16"
        result = replace(result, assumed=(*result.assumed, why))
    command = shlex.join(["fastdiff", *context.obj])
    with afterwards(json_file, lambda: to_json(result, source.name, command)):
        print(result)
