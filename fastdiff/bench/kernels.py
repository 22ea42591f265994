"""Times one kernel on one case.

On a GPU a sample is a CUDA graph's replay between two events, after the L2 cache was overwritten:
it includes neither Python nor launches. On a CPU it is wall-clock time over enough calls to take a
millisecond, on warm caches, as a layer finds the previous layer's output.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from fastdiff.bench.gpus import gpu_called
from fastdiff.bench.roofline import floor
from fastdiff.bench.tally import Tally
from fastdiff.kernels.contract import Case, Verdict, verify
from fastdiff.kernels.dispatch import Kernel, all_kernels
from fastdiff.runtime.graphs import NotCaptured, captured, described

LAUNCHES = 16
"""Launches per CUDA graph, each on its own tensors, which no other leaves in the L2 cache."""
L2_BYTES = 128 << 20  # at least the size of any GPU's L2 cache
LEAST_S = 1e-3  # reading a clock takes a ten-thousandth of it
QUICK_FLOPS, QUICK_BYTES = 1e9, 25e6
MODELS = ("demo", "sd15", "sdxl", "sd3", "flux", "vae", "lcm")

Sample = Callable[[], float]
"""Measures and returns the milliseconds of one call."""


class OutOfBudget(Exception):
    """A kernel's result is wrong, so its time does not count; the message says where."""


def cases(device: str | None = None) -> list[tuple[Kernel, Case]]:
    """The cases with sizes of real models; a spec's other cases only test for errors.

    With `device`, only those of kernels written for it, and on a CPU without the `large` ones.
    """
    on_cpu, own = device == "cpu", "cpu" if device in ("cpu", None) else "triton"
    return [
        (kernel, case)
        for kernel in all_kernels().values()
        for case in kernel.spec.cases
        if case.name.startswith(MODELS)
        and own in kernel.implementations
        and not (on_cpu and large(kernel, case))
    ]


def large(kernel: Kernel, case: Case) -> str | None:
    """A case's size in words, if its check and samples take seconds on two cores; else None."""
    flops, moved = kernel.spec.flops(case), kernel.spec.bytes(case, 4)
    if flops <= QUICK_FLOPS and moved <= QUICK_BYTES:
        return None
    return f"{flops / 1e9:.1f} GFLOP, {moved / 1e6:.0f} MB in float32"


def chosen(kernel: Kernel, device: torch.device) -> str:
    """The implementation that the op uses on `device`."""
    if device.type == "cpu":
        return "cpu"
    return "triton" if "triton" in kernel.implementations else "reference"


def check(
    kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device, which: str
) -> list[Verdict]:
    """Check a result before its time counts: OutOfBudget if an output exceeds the error budget."""
    verdicts = verify(kernel.spec, kernel.implementations[which](), case, dtype, device)
    if wrong := [v for v in verdicts if not v.passed]:
        errors = "; ".join(f"{v.output}: error {v.error:.1e} of {v.allowed:.1e}" for v in wrong)
        raise OutOfBudget(f"{kernel.spec.name} ({which}) on {case.name}: {errors}")
    return verdicts


def floor_ms(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device) -> float | None:
    """The roofline: a call's least time. None on a CPU, and on a GPU of unknown rates."""
    gpu = gpu_called(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return None
    work = Tally(1, kernel.spec.bytes(case, dtype.itemsize), kernel.spec.flops(case))
    return floor(work, gpu, dtype)[0]


def runner(
    kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device, which: str
) -> Sample:
    """A sampler of one implementation. It does not check results: call `check` first."""
    run = kernel.implementations[which]()
    sets = inputs_of(kernel, case, dtype, device)
    return sampler([partial(run, **inputs) for inputs in sets], device)


def inputs_of(
    kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """The inputs for a sample's calls: a set for each launch of the graph; on a CPU one set."""
    generator = torch.Generator(device).manual_seed(0)
    sets = range(LAUNCHES if device.type == "cuda" else 1)
    return [kernel.spec.inputs(case, dtype, device, generator) for _ in sets]


def sampler(runs: Sequence[Callable[[], object]], device: torch.device) -> Sample:
    """A sampler of functions that do the same on their own tensors, which it keeps alive.

    On a CPU only the first is called. On a GPU they form one graph.

    Raises NotCaptured if a function does something that a graph cannot hold.
    """
    if device.type == "cpu":
        return _by_clock(runs[0])
    with torch.cuda.device(device):
        return _by_events(runs)


def _by_clock(run: Callable[[], object]) -> Sample:
    def spent(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return time.perf_counter() - start

    run()  # the first call allocates
    calls = 1
    # the minimum, since a stall would make it look long
    while min(spent(calls) for _ in range(3)) < LEAST_S:
        calls *= 2

    def sample() -> float:
        run()  # refill the caches that another process has evicted
        return 1e3 * spent(calls) / calls

    return sample


def _by_events(runs: Sequence[Callable[[], object]]) -> Sample:
    def launch() -> None:
        for run in runs:
            run()

    stream, handle = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())  # that stream made the inputs
    with torch.cuda.stream(stream):
        for run in runs[:3]:  # Triton compiles, libraries choose
            run()
        _refuse_waits(runs[0])
    torch.cuda.synchronize()
    graph, _ = captured(launch, stream, handle)
    flush = _flush(torch.cuda.current_device())

    def sample() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / len(runs)

    return sample


def _refuse_waits(run: Callable[[], object]) -> None:
    """Raise NotCaptured if `run` waits for the GPU, for example to read a number from it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        raise NotCaptured(described(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


@cache
def _flush(device: int) -> torch.Tensor:
    """The buffer that is overwritten to clear the L2 cache; one for all samples."""
    return torch.empty(L2_BYTES, dtype=torch.int8, device=f"cuda:{device}")
