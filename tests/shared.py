"""Hooks and fixtures of all tests."""

import atexit
import copy
import gc
import os
import warnings

import copying
import hooked
import pytest
import stacks
import torch
from browsers import browser  # noqa: F401  a fixture
from compiling import compiled, compiling  # noqa: F401  fixtures
from exports import (  # noqa: F401  fixtures
    export_onnx,
    premade_onnx,
    small_demo,
    small_export,
    small_folder,
    small_onnx,
)
from forked import forked  # noqa: F401  a fixture
from interpreter import hasten, mend
from logged import as_warnings
from torch import Tensor, nn

from fastdiff.kernels.contract import Verdict, judge
from fastdiff.kernels.dispatch import NATIVE

mend()
hasten()
copying.hasten()
stacks.hasten()
as_warnings()

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # more threads than cores would only wait for each other
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))


LONGEST = (
    "test_onnx.py",
    "test_contract.py",
    "test_engines.py",
    "test_site.py",
    "test_sd3.py",
    "test_bench.py",
    "test_gates.py",
    "test_trt.py",
    "test_readme.py",
    "test_shipped.py",
    "test_random_edits.py",
    "test_parity.py",
    "test_triton.py",
    "test_states.py",
    "test_widths.py",
    "test_reads.py",
    "test_originals.py",
    "test_random_calls.py",
    "test_graphs.py",
    "test_counters.py",
    "test_inspect.py",
    "test_ahead.py",
)
"""Files that take 15 seconds or more, the longest first: if one of them started last, all workers
would wait for it. test_onnx.py makes exports that some of the others read, so the second file reads
none."""
POSITION = {name: position for position, name in enumerate(LONGEST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: POSITION.get(item.path.name, len(POSITION)))
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from visiting the million imported objects again."""
    hooked.hasten()
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # not before: pytest's own collections come last


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def chosen():
    """chosen(isa): run the C++ kernels of an instruction set until the test ends."""
    before = NATIVE.isa() if NATIVE else None
    yield lambda isa: isa and NATIVE.set_isa(isa)
    if before:
        NATIVE.set_isa(before)


@pytest.fixture
def budget():
    """budget(run, module, *inputs): check that run(*inputs) is within the error budget of `module`.

    The exact result is that of the module in float64; the budget follows from the error of the
    eager module in its own dtype.
    """

    def hold(run, module: nn.Module, *inputs, **options) -> Verdict:
        def cast(value):
            return (
                value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            )

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # a call that runs eagerly fails
            eager = module(*inputs, **options)
            exact = copy.deepcopy(module).double()(
                *map(cast, inputs), **{name: cast(value) for name, value in options.items()}
            )
            got = run(*inputs, **options)
        eager, exact, got = (o if isinstance(o, Tensor) else o[0] for o in (eager, exact, got))
        verdict = judge("output", got, eager, exact)
        assert verdict.passed, verdict
        return verdict

    return hold


@pytest.fixture(scope="session")
def demo():
    """The demo pipeline, eager, float32; tests take deep copies of it."""
    import fastdiff

    pipe = fastdiff.load_demo()
    pipe.set_progress_bar_config(disable=True)
    return pipe
