"""Shared by both suites: options, the clock, the facts stored with a number, skipped cases."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from fastdiff.bench.kernels import large
from fastdiff.bench.machine import commit, machine, versions
from fastdiff.bench.pipelines import check_device, check_dtype

LEFT_OUT = pytest.StashKey[dict]()


class Stopwatch:
    """pytest-benchmark's clock: it advances only by what was measured.

    So its statistics are those of our samples, which on a GPU come from events.
    """

    __name__ = "samples of fastdiff.bench"

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, sample: Callable[[], float], samples_ms: list[float]) -> None:
        samples_ms.append(sample())
        self.seconds += 1e-3 * samples_ms[-1]


STOPWATCH = Stopwatch()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdiff")
    group.addoption("--device", help="cpu or cuda; cuda where there is one")
    group.addoption("--dtype", help="fp32, bf16 or fp16; fp32 on a CPU, else fp16")
    group.addoption("--rounds", type=int, default=21, help="samples of each benchmark (21)")
    group.addoption("--all-sizes", action="store_true", help="on a CPU the large cases, too")
    group.addoption("--presets", default="", help="pipelines beside the demo: sd15,sd21,sdxl,tiny")
    group.addoption("--scale", type=float, default=1.0, help="of the presets, 0 to 1 (1)")
    group.addoption("--steps", type=int, default=4, help="of each picture (4)")


@pytest.hookimpl(trylast=True)  # after -k has deselected: those items are not listed as left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.benchmark(timer=STOPWATCH))
    if config.option.all_sizes or check_device(config.option.device) != "cpu":
        return
    config.stash[LEFT_OUT] = left_out = {item: why for item in ours if (why := too_large(item))}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def too_large(item: Any) -> str | None:
    """The size of an item's case in words, if it takes seconds on a CPU; else None."""
    params = item.callspec.params
    if "case_name" not in params:
        return None
    return large(*item.module.CASES[params["kernel_name"], params["case_name"]])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if left_out := config.stash.get(LEFT_OUT, {}):
        terminalreporter.section("left out on a CPU; --all-sizes runs them")
        for item, why in left_out.items():
            terminalreporter.line(f"{item.name}: {why}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.pop("node", None)  # a host name, which must not be published
    machine_info["fastdiff"] = {"machine": machine(), "versions": versions(), "commit": commit()}


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(check_device(pytestconfig.option.device))


@pytest.fixture(scope="session")
def dtype(pytestconfig: pytest.Config, device: torch.device) -> torch.dtype:
    return check_dtype(pytestconfig.option.dtype, device.type)


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> dict | None:
    """Name, architecture, memory and driver of the GPU in use; None on a CPU."""
    return machine()["gpu"] if device.type == "cuda" else None


@pytest.fixture
def record(benchmark: Any, device: torch.device, dtype: torch.dtype, gpu: dict | None):
    """record(sample, rounds, floor_ms, **facts): take samples and store them with the facts."""

    def take(sample: Callable[[], float], rounds: int, floor_ms: float | None, **facts: Any):
        samples_ms: list[float] = []
        benchmark.pedantic(STOPWATCH.advance, args=(sample, samples_ms), rounds=rounds)
        benchmark.extra_info |= facts | {
            "device": device.type,
            "gpu": gpu and gpu | {"clocks": clocks()},
            "dtype": str(dtype).removeprefix("torch."),
            "floor_ms": floor_ms,
            "roofline": floor_ms and floor_ms / median(samples_ms),
        }

    return take


def clocks() -> dict[str, str] | None:
    """The GPU's clocks, temperature and power right after the samples; None if unknown."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, answer.stdout.strip().split(", "), strict=False))
