"""Where a GPU spends the time of a denoising step: every kernel, from torch's profiler.

Two pictures with different numbers of steps are profiled; the difference leaves out what is done
once per picture (text encoders, hoisting). Kernels in a CUDA graph are seen like any others.
"""

import cProfile
import io
import pstats
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastdiff.bench.timing import clock, picture

FEW, MANY = 2, 10
"""The numbers of steps of the two pictures."""


def kernels_of_a_step(pipe: Any, side: int) -> list[dict[str, Any]]:
    """Rows of one step, most expensive kernel first: kernel, launches, microseconds.

    On a CPU the rows are torch's operators. `side`: of the picture, in pixels.
    """
    few, many = _profiled(pipe, side, FEW), _profiled(pipe, side, MANY)
    steps = MANY - FEW
    rows = [
        {
            "kernel": name,
            "launches": (launches - few.get(name, (0, 0.0))[0]) / steps,
            "us": (spent - few.get(name, (0, 0.0))[1]) / steps,
        }
        for name, (launches, spent) in many.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def step_ms(pipe: Any, side: int) -> float:
    """Wall-clock time of a step without the profiler, found the same way; the minimum of three."""
    device = pipe.device

    def spent(steps: int) -> float:
        start = clock(device)
        picture(pipe, side, side, steps)
        return clock(device) - start

    return 1e3 * min(spent(MANY) - spent(FEW) for _ in range(3)) / (MANY - FEW)


def _profiled(pipe: Any, side: int, steps: int) -> dict[str, tuple[int, float]]:
    on_gpu = pipe.device.type == "cuda"
    for _ in range(2):
        picture(pipe, side, side, steps)
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        picture(pipe, side, side, steps)
        if on_gpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    launches: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for event in recorded.events():
        if event.device_type == wanted:
            launches[event.name] += 1
            spent[event.name] += (
                event.self_device_time_total if on_gpu else event.self_cpu_time_total
            )
    return {name: (count, float(spent[name])) for name, count in launches.items()}


def on_the_host(run: Callable[[], object], most: int = 40) -> str:
    """Python's functions in one run, by cumulative time."""
    recorded = cProfile.Profile()
    recorded.runcall(run)
    told = io.StringIO()
    pstats.Stats(recorded, stream=told).strip_dirs().sort_stats("cumulative").print_stats(most)
    return told.getvalue()


def table(title: str, rows: list[dict[str, Any]], wall_ms: float, most: int = 45) -> list[str]:
    """Lines: the sum beside the wall-clock time, then the most expensive kernels."""
    total = sum(row["us"] for row in rows)
    launches = sum(row["launches"] for row in rows)
    lines = [
        f"{title}: a step takes {wall_ms:.3f} ms, its {launches:.0f} kernels {total / 1e3:.3f} ms"
    ]
    for row in rows[:most]:
        lines += [f"{row['us']:9.1f} us {row['launches']:6.1f} x  {row['kernel'][:120]}"]
    return lines
