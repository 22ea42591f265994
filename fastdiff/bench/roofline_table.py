"""A roofline as a table, and as the file `fastdiff.roofline/1`."""

import json
from dataclasses import asdict
from io import StringIO
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastdiff.bench.machine import commit, cpu_model, machine, versions
from fastdiff.bench.roofline import Roofline

SCHEMA = "fastdiff.roofline/1"
WIDTH = 120


def text(roofline: Roofline) -> str:
    """The table and, below it, where its figures come from."""
    measured = _measured(roofline)
    table = Table(title=_title(roofline), title_justify="left", pad_edge=False)
    table.add_column("block")
    table.add_column("per")
    for name in ("launches", "GFLOP", "MB", "floor ms", "bound by", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    if measured:
        table.add_column("measured ms", justify="right", no_wrap=True)
    for row in roofline.rows:
        measured_ms = "–" if row.measured_ms is None else f"{row.measured_ms:.3f}"
        table.add_row(
            row.block,
            row.per,
            str(row.launches),
            f"{row.flops / 1e9:.2f}",
            f"{row.bytes / 1e6:.1f}",
            f"{row.floor_ms:.4f}",
            row.bound,
            f"{row.share:.1%}",
            *([measured_ms] if measured else []),
        )
    out = StringIO()
    console = Console(file=out, width=WIDTH, highlight=False)
    console.print(table)
    for line in _footer(roofline, measured):
        console.print(line, style="dim", markup=False, soft_wrap=True)
    return out.getvalue().rstrip("\n")


def to_json(roofline: Roofline, case: str, command: str) -> str:
    """The roofline as schema `fastdiff.roofline/1`; `device` is where it was counted."""
    document = {
        "schema": SCHEMA,
        "note": "floors are arithmetic on counts, not measured",
        "measured_on": device_name(roofline.device) if _measured(roofline) else None,
        "case": case,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": command,
        **asdict(roofline),
        "step_floor_ms": roofline.step_ms,
        "image_floor_ms": roofline.image_ms,
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def device_name(device: str) -> str:
    """The processor or GPU that blocks were measured on."""
    gpu: dict[str, Any] | None = machine()["gpu"] if device == "cuda" else None
    return str(gpu["name"]) if gpu else cpu_model()


def _measured(roofline: Roofline) -> bool:
    return any(row.measured_ms is not None for row in roofline.rows)


def _title(roofline: Roofline) -> str:
    r = roofline
    return f"{r.pipeline}, {r.dtype}, {r.width}×{r.height}, {r.steps} steps, priced on {r.gpu.name}"


def _footer(roofline: Roofline, measured: bool) -> list[str]:
    gpu = roofline.gpu
    product_measured = gpu.measured_tflops is not None and roofline.dtype != "float32"
    copy_measured = gpu.measured_bandwidth is not None
    tflops = gpu.rate(getattr(torch, roofline.dtype)) / 1e12
    sources = [gpu.source]
    if gpu.measured_source and (product_measured or copy_measured):
        sources.append(f"measured: {gpu.measured_source}")
    return [
        f"floor of a step {roofline.step_ms:.3f} ms ({1e3 / roofline.step_ms:.0f} steps/s), of an"
        f" image {roofline.image_ms:.1f} ms: arithmetic, no measurement",
        f"{tflops:g} TFLOP/s {'measured' if product_measured else 'specified'},"
        f" {gpu.bytes_per_s / 1e12:g} TB/s {'measured' if copy_measured else 'specified'}"
        f" ({'; '.join(sources)})",
        "MB: all that launches read and write; what a cache keeps between two need not be moved",
        f"measured on {device_name(roofline.device)}: kernels called one by one, not replayed"
        if measured
        else "not measured",
    ]
