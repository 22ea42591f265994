"""graph: the kernels that a GPU would run in one step."""

import json
import shlex
from dataclasses import asdict
from typing import Annotated, Any

import typer

from fastdiff.cli.options import Json, Preset, Saved, app

SCHEMA = "fastdiff.graph/1"
HEAD = ("kernel", "launches", "MB", "GFLOP", "floor ms")
LEGEND = (
    "launches: in one denoising step, with guidance if there is a text",
    "MB: bytes that the launches read and write; GFLOP: products and convolutions",
    "floor ms: the least time that the launches can take on this GPU, from its bytes/s or FLOP/s,"
    " whichever takes longer; computed, not measured",
)


@app.command()
def graph(
    context: typer.Context,
    pipeline: Saved = None,
    preset: Preset = None,
    gpu: Annotated[
        str, typer.Option(help="The GPU to compute for, such as h200, h100, a100-80 or rtx4090.")
    ] = "h200",
    dtype: Annotated[str, typer.Option(help="bf16 or fp16.")] = "fp16",
    json_file: Json = None,
) -> None:
    """List the kernels that one step launches on a GPU, and the least time that they need.

    The step has guidance if the pipeline draws from text. Needs no GPU and reads no weights.
    """
    from fastdiff.bench.blueprints import named
    from fastdiff.bench.gpus import gpu_named
    from fastdiff.bench.graph import packed, rows, uses_guidance
    from fastdiff.bench.machine import commit, versions
    from fastdiff.bench.pipelines import check_dtype
    from fastdiff.bench.source import Source
    from fastdiff.written import afterwards, check_writable

    priced = gpu_named(gpu)
    if json_file:
        check_writable(json_file, "--json")
    source = Source(pipeline, preset)
    plan = named(source, "graph")
    found = rows(plan.denoiser, priced, check_dtype(dtype, "cuda"), plan.side)
    case = f"latents {plan.side}×{plan.side}, classifier-free guidance"
    if not uses_guidance(plan.denoiser):
        case = f"latents {plan.side}×{plan.side}"
    elif not plan.side:
        case = "an embedding, classifier-free guidance"
    elif plan.vae is None and not packed(plan.denoiser):
        case = f"{plan.side}×{plan.side} pixels"
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "note": "counted and priced at the roofline, not measured",
        "case": f"{preset or source.name}, {dtype}, {case}",
        "gpu": priced.name,
        "versions": {name: versions()[name] for name in ("torch", "diffusers")},
        "commit": commit(),
        "command": shlex.join(["fastdiff", *context.obj]),
        "launches": sum(row.launches for row in found),
        "bytes": sum(row.bytes for row in found),
        "flops": sum(row.flops for row in found),
        "floor_ms": sum(row.floor_ms for row in found),
        "rows": [asdict(row) for row in found],
    }
    with afterwards(json_file, lambda: json.dumps(document, indent=1) + "\n"):
        _show(document)


def _show(document: dict[str, Any]) -> None:
    from fastdiff import tables

    rows = [
        tables.Row(
            (
                row.get("kernel", "all"),
                str(row["launches"]),
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['flops'] / 1e9:.1f}",
                f"{row['floor_ms']:.4f}",
            ),
            apart=row is document,
        )
        for row in (*document["rows"], document)
    ]
    title = f"{document['case']}, computed for {document['gpu']}"
    console = tables.printer()
    tables.show(console, title, HEAD, rows)
    tables.below(console, LEGEND)
