"""The new state's times as pytest-benchmark's JSON.

`pytest-benchmark compare`, github-action-benchmark (`tool: pytest`) and Bencher read it.
"""

import json
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from fastdiff.jsonable import finite
from fastdiff.regression.comparison import Comparison, Line, State
from fastdiff.regression.reports import words

VERSION = "5.1.0"
"""The version of pytest-benchmark whose format this is."""


def to_pytest_benchmark(comparison: Comparison) -> str:
    """All times in seconds, as in pytest-benchmark; its format has no counters."""
    new = comparison.new
    times = [line for line in comparison.lines if line.kind == "time" and line.new is not None]
    document = {
        "machine_info": _machine(new),
        "commit_info": {"id": new.commit, "time": None, "dirty": _dirty(new), "branch": None},
        "benchmarks": [_benchmark(line) for line in times],
        "datetime": new.created or datetime.now(UTC).isoformat(),
        "version": VERSION,
    }
    return json.dumps(finite(document), indent=1, allow_nan=False) + "\n"


def _benchmark(line: Line) -> dict[str, Any]:
    samples = [ms / 1e3 for process in line.new_samples for ms in process]
    assert line.new is not None
    name = words.plain(line.name, limit=None)  # its table prints only printable characters
    coarse, _, fine = name.partition(words.SEPARATOR)
    return {
        "group": coarse if fine else None,
        "name": name,
        "fullname": name,
        "params": None,
        "param": None,
        "extra_info": {
            "processes": len(line.new_samples),
            "verdict": line.verdict,
            "ratio_to_base": line.ratio,
        },
        "options": {
            "disable_gc": False,
            "timer": "perf_counter",
            "min_rounds": 1,
            "max_time": 0.0,
            "min_time": 0.0,
            "warmup": True,
        },
        "stats": _stats(samples or [line.new / 1e3]),
    }


def _stats(seconds: Sequence[float]) -> dict[str, Any]:
    data = sorted(seconds)
    mean, median = statistics.fmean(data), statistics.median(data)
    stddev = statistics.stdev(data) if len(data) > 1 else 0.0
    alone = len(data) == 1
    q1, _, q3 = [median] * 3 if alone else statistics.quantiles(data, method="inclusive")
    iqr = q3 - q1
    inside = [x for x in data if q1 - 1.5 * iqr <= x <= q3 + 1.5 * iqr]
    far = sum(abs(x - mean) > stddev for x in data)
    return {
        "min": data[0],
        "max": data[-1],
        "mean": mean,
        "stddev": stddev,
        "rounds": len(data),
        "median": median,
        "iqr": iqr,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": len(data) - len(inside),
        "stddev_outliers": far,
        "outliers": f"{far};{len(data) - len(inside)}",
        "ld15iqr": inside[0],
        "hd15iqr": inside[-1],
        "ops": 1 / mean if mean else 0.0,
        "total": sum(data),
        "iterations": 1,
        "data": list(seconds),
    }


def _machine(state: State) -> dict[str, Any]:
    machine = dict(state.machine)
    if isinstance(machine.get("cpu"), dict):  # already in pytest-benchmark's form
        return machine
    system, _, architecture = str(machine.get("os") or "").partition(" ")
    return {
        "node": "",  # host names are private
        "processor": architecture,
        "machine": architecture,
        "python_version": state.versions.get("python"),
        "release": "",
        "system": system,
        "cpu": {"brand_raw": machine.get("cpu"), "count": machine.get("cores")},
        "gpu": machine.get("gpu"),
        "versions": dict(state.versions),
    }


def _dirty(state: State) -> bool:
    return bool(state.commit and state.commit.endswith("-dirty"))
