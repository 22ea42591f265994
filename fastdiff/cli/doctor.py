"""doctor: what keeps a pipeline on this machine from being fast."""

import json
from dataclasses import asdict

import typer

from fastdiff.cli.options import (
    Config,
    Device,
    Dtype,
    Json,
    Lora,
    Pipeline,
    Scheduler,
    Side,
    Variant,
    app,
    source_of,
)

SCHEMA = "fastdiff.doctor/1"


@app.command()
def doctor(
    context: typer.Context,
    pipeline: Pipeline = None,
    scheduler: Scheduler = None,
    lora: Lora = None,
    variant: Variant = None,
    config: Config = None,
    dtype: Dtype = None,
    device: Device = None,
    height: Side = None,
    width: Side = None,
    json_file: Json = None,
) -> None:
    """Say what keeps a pipeline on this machine from being fast, and what to do about it.

    Draws three pictures of two steps each. Exits with 1 if something keeps the pipeline from being
    fast. A missing extra does not count: it only adds other commands.
    """
    from fastdiff.bench import doctor
    from fastdiff.bench.pipelines import check_device, check_dtype, check_size
    from fastdiff.bench.progress import status
    from fastdiff.bench.room import room
    from fastdiff.bench.source import opened
    from fastdiff.installed import BRINGS, pip
    from fastdiff.written import afterwards, check_writable

    if json_file:
        check_writable(json_file, "--json")
    source = source_of(context)
    source.check()
    device = check_device(device)
    torch_dtype = check_dtype(dtype, device)
    found = doctor.of_machine(device)
    if not any(one.blocks for one in found):
        with status() as log:
            log("loading")
            pipe = opened(source, torch_dtype, device)
            height, width = check_size(pipe, height, width)
            log("drawing three pictures of two steps")
            with room(pipe, height, width, device):
                found += doctor.of_pipeline(pipe.to(device), height, width)
    absent = doctor.absent()
    document = {
        "schema": SCHEMA,
        "pipeline": source.name,
        "device": device,
        "findings": [asdict(one) for one in found],
        "absent": absent,
    }
    with afterwards(json_file, lambda: json.dumps(document, indent=1) + "\n"):
        for one in found:
            print(f"slow: {one}")
        for extra, needs in absent.items():
            print(f"not installed: {', '.join(needs)}, for {BRINGS[extra]}; {pip(extra)}")
        if not found:
            print(f"fast: found nothing that slows {source.name} on {device}")
    if found:
        raise typer.Exit(1)
