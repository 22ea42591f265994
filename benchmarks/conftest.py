"""What both suites share: options, the clock, what a number is stored with, what was left out."""

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
    """The clock of pytest-benchmark: it moves by what was measured, and stands still otherwise.

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


@pytest.hookimpl(trylast=True)  # what -k deselects was not left out by us
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
    """The size of an item's kernel and case where it takes seconds on a CPU."""
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
    machine_info.pop("node", None)  # a host's name: such a file may be published
    machine_info["fastdiff"] = {"machine": machine(), "versions": versions(), "commit": commit()}


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(check_device(pytestconfig.option.device))


@pytest.fixture(scope="session")
def dtype(pytestconfig: pytest.Config, device: torch.device) -> torch.dtype:
    return check_dtype(pytestconfig.option.dtype, device.type)


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> dict | None:
    """Name, architecture, memory and driver of the GPU that is timed; None on a CPU."""
    return machine()["gpu"] if device.type == "cuda" else None


@pytest.fixture
def record(benchmark: Any, device: torch.device, dtype: torch.dtype, gpu: dict | None):
    """record(sample, rounds, floor_ms, **facts): take the samples, store them with the facts."""

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
    """What the GPU runs at right after the samples, as its driver says; None where it does not."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, answer.stdout.strip().split(", "), strict=False))
