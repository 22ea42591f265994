"""doctor: what keeps this machine, and a pipeline on it, from being fast."""

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
    Preset,
    Scale,
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
    preset: Preset = None,
    scale: Scale = 1.0,
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

    Draws three pictures of two steps. Exits with 0 if nothing does, with 1 if something does.
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
    device = check_device(device)
    torch_dtype = check_dtype(dtype, device)
    source = source_of(context)
    found = doctor.of_machine(device)
    if not doctor.missing("diffusers"):
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
        for extra, packages in absent.items():
            print(f"absent: {', '.join(packages)}, for {BRINGS[extra]}; {pip(extra)}")
        if not found:
            print(f"nothing keeps {source.name} from being fast on {device}")
    if found:
        raise typer.Exit(1)
