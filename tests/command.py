"""The command line as a test calls it."""

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest

from fastdiff.cli import main


def environment() -> dict[str, str]:
    """Variables for a process of its own: kernels can be compiled in it, and it is no test worker,
    on which pytest-benchmark measures nothing."""
    left_out = ("TRITON_INTERPRET", "PYTEST_XDIST")
    return {k: v for k, v in os.environ.items() if not k.startswith(left_out)}


def run(*arguments: Any) -> tuple[Any, str, str]:
    """Exit code, stdout and stderr of `fastdiff` with these arguments."""
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as caught,
    ):
        main([str(argument) for argument in arguments])
    return caught.value.code, out.getvalue(), err.getvalue()
