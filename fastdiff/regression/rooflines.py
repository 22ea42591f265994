"""Reads rooflines from `fastdiff.roofline/1` files and from `pytest benchmarks`."""

from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastdiff.bench.gpus import Gpu, gpu_called
from fastdiff.errors import UserError
from fastdiff.regression.documents import checked, load, number
from fastdiff.regression.reports.roofline import Roofline, RoofPoint


def read(path: Path) -> Roofline:
    """The blocks of a pipeline, or the kernels of a suite that ran on a GPU of known rates."""
    document = load(path)
    if document.get("schema") == "fastdiff.roofline/1":
        return checked(path, lambda: _blocks(document))
    if "benchmarks" in document:
        return checked(path, lambda: _suite(document))
    raise UserError(f"{path} holds no roofline; give a file that fastdiff roofline wrote")


def _blocks(document: dict[str, Any]) -> Roofline:
    # in older files reported rates are called measured
    facts = {name.replace("measured_", "reported_"): of for name, of in document["gpu"].items()}
    points = tuple(_point(row["block"], row, row["measured_ms"]) for row in document["rows"])
    gpu = Gpu(**facts)
    return _roof(gpu, getattr(torch, document["dtype"]), points)


def _suite(document: dict[str, Any]) -> Roofline:
    rows = [row for row in document["benchmarks"] if "flops" in row["extra_info"]]
    facts = rows[0]["extra_info"] if rows else {}
    gpu = gpu_called(facts["gpu"]["name"]) if facts.get("gpu") else None
    if gpu is None:
        raise UserError("its kernels ran on a device of unknown rates; measure on a GPU")
    points = tuple(
        _point(
            row["name"],
            row["extra_info"],
            1e3 * median(row["stats"].get("data") or [row["stats"]["median"]]),
        )
        for row in rows
    )
    return _roof(gpu, getattr(torch, facts["dtype"]), points)


def _point(name: str, work: dict[str, Any], ms: float | None) -> RoofPoint:
    flops, moved = number(name, work["flops"], 0), number(name, work["bytes"], 0)
    return RoofPoint(name, flops, moved, None if ms is None else number(name, ms, 1e-12))


def _roof(gpu: Gpu, dtype: torch.dtype, points: tuple[RoofPoint, ...]) -> Roofline:
    rates = (number(gpu.name, rate, 1e-12) for rate in (gpu.rate(dtype), gpu.bytes_per_s))
    tflops, tbytes = (rate / 1e12 for rate in rates)
    return Roofline(gpu.device, tflops, tbytes, points)
