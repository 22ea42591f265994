"""Numbers that do not jitter, by name: what a report can gate on without a quiet machine."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastdiff.bench.counters import Row, count_pictures
from fastdiff.bench.drawn import drawn

Number = tuple[float, str]
"""A value and its unit."""

PEAK = "peak bytes"
"""The unit of what jitters a little after all: a scalar more or less that is alive by chance."""

_RECORDINGS = {
    "first": "first size",
    "again": "same size again",
    "other_size": "another size",
    "back": "first size again",
}


def gates(pipe: Any, height: int, width: int) -> dict[str, Number]:
    """Of a compiled pipeline that has not drawn before; sides in pixels."""
    real = drawn(pipe, height, width)
    return numbers(asdict(Row("fastdiff", count_pictures(pipe, height, width), real)))


def numbers(row: Mapping[str, Any]) -> dict[str, Number]:
    """From a row of a `fastdiff.counts/1` document."""
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
