"""Counts by name, which do not vary: a report can gate on them without a quiet machine."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from fastdiff.bench.backends import BACKENDS
from fastdiff.bench.counters import Counted, count_pictures
from fastdiff.bench.drawn import drawn
from fastdiff.bench.memory import baseline

Number = tuple[float, str]
"""A value and its unit."""

PEAK = "peak bytes"
"""The unit of a count that varies slightly, by a scalar that happens to be alive or not."""

DRAWN = ("recordings", "graphs", PEAK)
"""Units of the counts that need drawn pictures: `fastdiff count --draw`."""

_RECORDINGS = {
    "first": "first size",
    "again": "same size again",
    "other_size": "another size",
    "back": "first size again",
}


def gates(load: Callable[[], Any], device: str, height: int, width: int) -> dict[str, Number]:
    """Count the pipeline that `load` returns on `device`, compiled; sizes in pixels."""
    before = baseline(torch.device(device))
    pipe = load()
    BACKENDS["fastdiff"](pipe)
    real = drawn(pipe, height, width, before)
    return numbers(asdict(Counted("fastdiff", count_pictures(pipe, height, width), real)))


def numbers(row: Mapping[str, Any]) -> dict[str, Number]:
    """The numbers of a row in a `fastdiff.counts/1` document, by name."""
    counts = row["counts"]
    found: dict[str, Number] = {}
    for part in ("step", "image"):
        work = counts[part]
        for name in ("launches", "bytes", "flops"):
            found[f"{part} · {name}"] = (sum(kind[name] for kind in work.values()), name)
        reads = work.get("host read", {"launches": 0})["launches"]
        found[f"{part} · host reads"] = (reads, "host reads")
        kernels = counts.get(f"{part}_kernels")
        if kernels is not None:
            found[f"{part} · GPU kernels"] = (kernels, "kernels")
    if real := row.get("drawn"):
        for key, name in _RECORDINGS.items():
            found[f"recordings · {name}"] = (real[key], "recordings")
        found["compilations"] = (real["compilations"], "graphs")
        found["peak memory"] = (real["peak_bytes"], PEAK)
    return found
