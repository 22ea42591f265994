"""bench --roofline: what each block of a pipeline costs a GPU at least."""

import shlex
from dataclasses import replace
from pathlib import Path

import typer

from fastdiff.cli.options import choose_pipe, was_given
from fastdiff.errors import UserError

FOREIGN = ("backends", "engines", "seed")
"""Options of bench that change nothing here."""


def price(context: typer.Context) -> None:
    """Price the pipeline that bench's options name: print the table, write it where asked.

    Blocks are timed on a GPU, and on a CPU with --measure: a full-size network takes minutes there.
    Without --dtype a CPU counts bfloat16: it costs a GPU what float16 does, and our CPU kernels
    compute it.
    """
    from fastdiff.bench.gpus import gpu_named
    from fastdiff.bench.pipelines import check_device, check_dtype, check_size
    from fastdiff.bench.progress import status
    from fastdiff.bench.roofline import roofline
    from fastdiff.bench.roofline_table import to_json
    from fastdiff.bench.room import room
    from fastdiff.compiler import compile
    from fastdiff.written import afterwards, check_writable

    given = context.params
    if not given["roofline"]:
        raise UserError("--gpu and --measure go with --roofline")
    for name in FOREIGN:
        if was_given(context, name):
            raise UserError(f"--{name} goes without --roofline, which prices fastdiff's networks")
    json_file = Path(given["json_file"]) if given["json_file"] else None
    if json_file:
        check_writable(json_file, "--json")
    if given["gpu"] is not None:
        gpu_named(given["gpu"])
    device = check_device(given["device"])
    on_gpu = device.startswith("cuda")
    dtype = check_dtype(given["dtype"] or (None if on_gpu else "bf16"), device)
    folder = Path(given["folder"]) if given["folder"] else None
    with status() as log:
        log("loading")
        pipe, case = choose_pipe(folder, given["preset"], given["scale"], dtype, device)
        log("counting")
        with room(pipe, *check_size(pipe, given["height"], given["width"]), device):
            result = roofline(
                compile(pipe.to(device)),  # for good: to restore a large network takes its time
                given["gpu"],
                steps=given["steps"],
                height=given["height"],
                width=given["width"],
                rounds=given["rounds"] if on_gpu or given["measure"] else 0,
            )
    if given["dtype"] is None and not on_gpu:
        why = "bfloat16, as no --dtype was given: it costs a GPU what float16 does"
        result = replace(result, assumed=(*result.assumed, why))
    command = shlex.join(["fastdiff", *context.obj])
    with afterwards(json_file, lambda: to_json(result, case, command)):
        print(result)
