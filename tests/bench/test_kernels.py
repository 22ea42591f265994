"""Kernel benchmarks: what a sample times, which kernels are refused, what the file holds."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch
from command import environment

from benchmarks.race import race
from fastdiff.bench import kernels
from fastdiff.bench.kernels import OutOfBudget, cases, check, chosen, floor_ms, large, runner
from fastdiff.kernels.contract import judge
from fastdiff.kernels.dispatch import KERNELS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FP32 = torch.float32


def with_cpu(name, run):
    """The kernel `name` with `run` as its CPU implementation, and its first case."""
    (kernel, case), *_ = [pair for pair in cases("cpu") if pair[0].spec.name == name]
    return replace(kernel, implementations=kernel.implementations | {"cpu": lambda: run}), case


def script(name):
    spec = spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Clock:
    """A clock that moves only when a test moves it."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(kernels, "time", clock)
    return clock


@pytest.mark.parametrize(("takes_ms", "calls"), [(0.3, 4), (0.26, 4), (0.01, 128), (40, 1)])
def test_a_sample_is_the_time_of_one_call(clock, takes_ms, calls):
    made = []

    def run(**inputs):
        clock.now += 1e-3 * takes_ms
        made.append(inputs)

    kernel, case = with_cpu("concat", run)
    sample = runner(kernel, case, FP32, CPU, "cpu")
    for _ in range(3):
        made.clear()
        assert sample() == pytest.approx(takes_ms)
        assert len(made) == 1 + calls, "one untimed call, then at least a millisecond of calls"
    want = kernel.spec.inputs(case, FP32, CPU, torch.Generator().manual_seed(0))
    assert made[0].keys() == want.keys()


def test_one_stall_does_not_make_a_short_kernel_long(clock):
    takes_s = chain([1e-5, 0.5], repeat(1e-5))

    def run(**inputs):
        clock.now += next(takes_s)

    kernel, case = with_cpu("concat", run)
    sample = runner(kernel, case, FP32, CPU, "cpu")
    before = clock.now
    assert sample() == pytest.approx(0.01)
    assert clock.now - before == pytest.approx(129 * 1e-5)


@pytest.mark.parametrize("name", ["concat", "group_norm_silu", "linear"])
def test_the_timed_call_computes_the_op(name):
    seen = []

    def spy(**inputs):
        seen.append((inputs, KERNELS[name].implementations["cpu"]()(**inputs)))
        return seen[-1][1]

    kernel, case = with_cpu(name, spy)
    assert runner(kernel, case, FP32, CPU, "cpu")() > 0
    inputs, got = seen[-1]
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    outputs = [
        run if isinstance(run, tuple) else (run,)
        for run in (got, kernel.spec.reference(**inputs), kernel.spec.reference(**double))
    ]
    for output in zip(*outputs, strict=True):
        assert judge("output", *output).passed


def test_a_wrong_kernel_gets_no_number():
    kernel, case = with_cpu("linear", lambda **inputs: KERNELS["linear"].op(**inputs) * 1.001)
    with pytest.raises(OutOfBudget, match=r"linear \(cpu\) on demo-qkv: output 0: error .* of"):
        check(kernel, case, FP32, CPU, "cpu")

    suite = script("test_kernels")
    suite.CASES["linear", case.name] = kernel, case

    def record(*_args, **_facts):
        raise AssertionError("a number was taken")

    with pytest.raises(OutOfBudget):
        suite.test_kernel("linear", case.name, CPU, FP32, None, record)

    with pytest.raises(OutOfBudget):
        race(kernel, case, CPU, "cpu", dry_run=True, inductor=False)


def test_cases_come_from_models_and_fit_the_device():
    names = {(kernel.spec.name, case.name) for kernel, case in cases()}
    assert len(names) == len(cases()), "names of cases are unique"
    # mean_pool runs on CPUs only, and only in ADM's networks
    assert {kernel for kernel, _ in names} == KERNELS.keys() - {"mean_pool"}
    assert not {case for _, case in names} & {"odd", "tiny", "one-pixel", "far-mean"}
    left_out = {
        f"{kernel.spec.name}-{case.name}"
        for kernel, case in cases()
        if (kernel.spec.name, case.name) not in {(k.spec.name, c.name) for k, c in cases("cpu")}
    }
    assert "attention-sdxl-64-self" in left_out
    assert all(large(k, c) for k, c in cases() if f"{k.spec.name}-{c.name}" in left_out)
    assert {chosen(kernel, torch.device("cuda")) for kernel, _ in cases("cuda")} == {"triton"}


def test_a_floor_needs_a_gpu_of_known_rates(monkeypatch):
    kernel, case = next((k, c) for k, c in cases() if c.name == "sdxl-64-self")
    assert floor_ms(kernel, case, FP32, CPU) is None
    for name, floor in [
        ("NVIDIA H200", pytest.approx(kernel.spec.flops(case) / 790e9)),
        ("a card of next year", None),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert floor_ms(kernel, case, torch.float16, torch.device("cuda")) == floor


def test_the_suite_stores_samples_facts_and_machine_and_says_what_it_left_out(tmp_path):
    file = tmp_path / "kernels.json"
    command = ["-m", "pytest", "benchmarks", "-k", "concat-demo-16 or vae-top", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *command, "--rounds", "7", "--benchmark-json", file],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out on a CPU" in done.stdout
    assert "test_kernel[group_norm_silu-vae-top]: 0.1 GFLOP, 67 MB" in done.stdout
    document = json.loads(file.read_text())
    assert "node" not in document["machine_info"], "the name of a host"
    facts = document["machine_info"]["fastdiff"]
    assert facts["machine"]["threads"] >= 1
    assert facts["versions"]["torch"] == torch.__version__
    (row,) = document["benchmarks"]
    assert row["name"] == "test_kernel[concat-demo-16]"
    assert len(row["stats"]["data"]) == row["stats"]["rounds"] == 7
    assert all(0 < seconds < 1 for seconds in row["stats"]["data"])
    kernel, case = next(
        (k, c) for k, c in cases() if (k.spec.name, c.name) == ("concat", "demo-16")
    )
    assert row["extra_info"] == {
        "which": "cpu",
        "bytes": kernel.spec.bytes(case, 4),
        "flops": kernel.spec.flops(case),
        "device": "cpu",
        "gpu": None,
        "dtype": "float32",
        "floor_ms": None,
        "roofline": None,
    }
