"""A roofline as a table, and as a file of schema `fastdiff.roofline/1`."""

import json
from dataclasses import asdict
from io import StringIO
from typing import Any

import torch

from fastdiff import tables
from fastdiff.bench.machine import commit, cpu_model, machine, versions
from fastdiff.bench.roofline import Roofline

SCHEMA = "fastdiff.roofline/1"
HEAD = ("block", "per", "launches", "GFLOP", "MB", "floor ms", "bound by", "share", "measured ms")
LEFT = ("per", "bound by")
LEGEND = (
    "floor ms: the least time that a block can take on this GPU, from its FLOP/s or bytes/s,"
    " whichever takes longer; bound by: which of the two; share: of a whole picture's floor",
    "MB: all bytes that the launches read and write; data that stays in a cache between launches"
    " is not moved",
)


def text(roofline: Roofline) -> str:
    """The table, with a legend and the sources of its figures below it."""
    measured = _measured(roofline)
    rows = []
    for row in roofline.rows:
        measured_ms = "–" if row.measured_ms is None else f"{row.measured_ms:.3f}"
        cells = (
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
        rows.append(tables.Row(cells))
    out = StringIO()
    console = tables.printer(out)
    tables.show(console, _title(roofline), HEAD[: None if measured else -1], rows, LEFT)
    tables.below(console, (*LEGEND, *_footer(roofline, measured)))
    return out.getvalue().rstrip("\n")


def to_json(roofline: Roofline, case: str, command: str) -> str:
    """The roofline as schema `fastdiff.roofline/1`; `device`: where it was counted."""
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
    """The name of the processor or GPU on which blocks were measured."""
    gpu: dict[str, Any] | None = machine()["gpu"] if device == "cuda" else None
    return str(gpu["name"]) if gpu else cpu_model()


def _measured(roofline: Roofline) -> bool:
    return any(row.measured_ms is not None for row in roofline.rows)


def _title(roofline: Roofline) -> str:
    r = roofline
    steps = tables.plural(r.steps, "step")
    return f"{r.pipeline}, {r.dtype}, {r.width}×{r.height}, {steps}, on {r.gpu.name}"


def _footer(roofline: Roofline, measured: bool) -> list[str]:
    gpu = roofline.gpu
    product_reported = gpu.reported_tflops is not None and roofline.dtype != "float32"
    copy_reported = gpu.reported_bandwidth is not None
    tflops = gpu.rate(getattr(torch, roofline.dtype)) / 1e12
    sources = []
    if not (product_reported and copy_reported):
        sources.append(f"specified: {gpu.source}")
    if gpu.reported_source and (product_reported or copy_reported):
        sources.append(f"reported: {gpu.reported_source}")
    return [
        f"floor of a step {roofline.step_ms:.3f} ms ({1e3 / roofline.step_ms:.0f} steps/s), of an"
        f" image {roofline.image_ms:.1f} ms: computed from counts",
        *(f"assumed: {sentence}" for sentence in roofline.assumed),
        f"{tflops:g} TFLOP/s {'reported' if product_reported else 'specified'},"
        f" {gpu.bytes_per_s / 1e12:g} TB/s {'reported' if copy_reported else 'specified'}"
        f" ({'; '.join(sources)})",
        f"measured on {device_name(roofline.device)}: kernels called one by one, not replayed"
        if measured
        else "no block was measured",
    ]
