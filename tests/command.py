"""Runs the command line within a test, and programs in separate processes."""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from fastdiff.cli import main


def environment() -> dict[str, str]:
    """Environment variables for a separate process. It can compile kernels, and it is not an xdist
    worker, in which pytest-benchmark measures nothing."""
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


def run_json(*arguments: Any) -> tuple[Any, Any, str]:
    """Exit code, what `--json` writes, and stderr of `fastdiff` with these arguments."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "document.json")
        code, _, err = run(*arguments, "--json", file)
        assert file.is_file(), err
        return code, json.loads(file.read_text()), err


def until(holds: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until `holds()` is true; fails if it is not after so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"this did not become true in {seconds:g} s"
        time.sleep(0.02)


COPIED = """
gc.collect()
gc.freeze()  # a collection in a copy would write to, and so copy, all memory
for _line in sys.stdin:
    code, sys.argv, variables, out, err = json.loads(_line)
    if not (_child := os.fork()):
        os.environ |= variables
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for _number, _name in ((1, out), (2, err)):
            os.dup2(os.open(_name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), _number)
        # a line is one write, also where Python buffers nothing: ranks write to the same file
        sys.stdout.reconfigure(line_buffering=True, write_through=False)
        _status = 0
        try:
            exec(code, globals())
        except SystemExit as _end:
            _status = _end.code or 0
        except BaseException:
            traceback.print_exc()
            _status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)
    print(os.waitstatus_to_exitcode(os.waitpid(_child, 0)[1]), flush=True)
"""


@contextmanager
def copied(begin: str, folder: Path) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Yields run(code, *arguments, **variables), which runs a program in a fork of one process that
    has already run `begin`, so what `begin` imports is imported once. Programs use one thread.

    run returns exit code, stdout and stderr; it writes the output to files in `folder`.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", f"import gc, json, os, sys, traceback\n{begin}\n{COPIED}"],
        env=environment() | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    out, err = (folder / name for name in ("out.txt", "err.txt"))

    def run(code: str, *arguments: str, **variables: str) -> tuple[int, str, str]:
        request = [code, ["-c", *arguments], variables, str(out), str(err)]
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline()), out.read_text(), err.read_text()

    try:
        yield run
    finally:
        process.stdin.close()
        process.wait()
