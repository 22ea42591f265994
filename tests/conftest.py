"""Triton kernels run on the CPU interpreter here; the variable is read when they are imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from fastdiff.kernels.contract import Verdict, judge


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def budget():
    """budget(run, module, *inputs): hold run(*inputs) to the error budget of `module`'s own call.

    The truth is the module in float64; the yardstick is the module itself, eager, in its dtype.
    """

    def hold(run, module: nn.Module, *inputs, **options) -> Verdict:
        def cast(value):
            return (
                value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            )

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # a silent eager call proves nothing
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


@pytest.fixture(scope="session")
def demo_onnx(demo, tmp_path_factory):
    """The demo pipeline as `fastdiff export --onnx` writes it."""
    from fastdiff.export import onnx
    from fastdiff.export.parts import parts

    folder = tmp_path_factory.mktemp("onnx") / "demo"
    onnx.export(demo, parts(demo, torch.float32), folder, onnx.ORT_OPSET, lambda line: None)
    return folder
