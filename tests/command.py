"""The command line as a test calls it, and what the kernels compile to in another process."""

import io
import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from fastdiff.cli import main

TABLE = """
import dataclasses, json, sys, torch
from fastdiff.kernels.inspect import table
archs, dtype, narrowed = json.loads(sys.argv[1])
rows = table(archs, [getattr(torch, dtype)], **narrowed)
rows = [dataclasses.asdict(row) | {"fits": row.fits, "faults": row.faults} for row in rows]
json.dump(rows, sys.stdout)
"""


def environment() -> dict[str, str]:
    """Variables for a process of its own: kernels can be compiled in it, and it is no test worker,
    on which pytest-benchmark measures nothing."""
    left_out = ("TRITON_INTERPRET", "PYTEST_XDIST")
    return {k: v for k, v in os.environ.items() if not k.startswith(left_out)}


def compiled(archs: Any, dtype: str = "float16", **narrowed: Any) -> list[dict[str, Any]]:
    """`inspect.table`'s rows, their faults with them, by another process: in the tests' own the
    kernels are those of Triton's interpreter. `narrowed`: its `cases` and `ops`."""
    command = [sys.executable, "-c", TABLE, json.dumps([archs, dtype, narrowed])]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run(*arguments: Any) -> tuple[Any, str, str]:
    """Exit code, stdout and stderr of `fastdiff` with these arguments."""
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as caught,
    ):
        main([str(argument) for argument in arguments])
    return caught.value.code, out.getvalue(), err.getvalue()


def run_json(*arguments: Any) -> tuple[Any, Any, str]:
    """Exit code, what `--json` writes, and stderr of `fastdiff` with these arguments."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "document.json")
        code, _, err = run(*arguments, "--json", file)
        assert file.is_file(), err
        return code, json.loads(file.read_text()), err
