"""graph: a step kernel by kernel, as a GPU would be asked for it."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli.options import PRESETS, app

SCHEMA = "fastdiff.graph/1"
HEAD = ("kernel", "launches", "MB", "GFLOP", "floor ms")


@app.command()
def graph(
    context: typer.Context,
    preset: Annotated[str, typer.Option(help=PRESETS)] = "sd15",
    gpu: Annotated[str, typer.Option(help="h200, h100, a100-80, rtx4090, …")] = "h200",
    dtype: Annotated[str, typer.Option(help="bf16 or fp16.")] = "fp16",
    out: Annotated[Path | None, typer.Option(help="Write fastdiff.graph/1 here.")] = None,
) -> None:
    """The launches of one guided step by kernel, their bytes, FLOPs and floors; no GPU needed."""
    from fastdiff.bench.gpus import gpu_named
    from fastdiff.bench.graph import rows
    from fastdiff.bench.machine import commit, versions
    from fastdiff.bench.pipelines import check_dtype
    from fastdiff.bench.presets import blueprint
    from fastdiff.written import afterwards, check_writable

    priced = gpu_named(gpu)
    network, side = blueprint(preset)
    if out:
        check_writable(out, "--out")
    found = rows(network, priced, check_dtype(dtype, "cuda"), side)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "note": "counted and priced at the roofline, not measured",
        "case": f"{preset}, {dtype}, latents {side}×{side}, classifier-free guidance",
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
    with afterwards(out, lambda: json.dumps(document, indent=1) + "\n"):
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
    title = f"{document['case']}, floors on {document['gpu']}"
    tables.show(tables.printer(), title, HEAD, rows)
