"""The command line as a test calls it."""

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest

from fastdiff.cli import main


def run(*arguments: Any) -> tuple[Any, str, str]:
    """Exit code, stdout and stderr of `fastdiff` with these arguments."""
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as caught,
    ):
        main([str(argument) for argument in arguments])
    return caught.value.code, out.getvalue(), err.getvalue()
