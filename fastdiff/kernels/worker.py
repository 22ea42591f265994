"""Compiles kernels for GPUs that need not be present: `python -m fastdiff.kernels.worker`.

It reads one line of JSON, {"processes": n, "jobs": [...]} (`jobs.Job`), and writes a line for each
finished job: {"job": at, "key": …} or {"job": at, "error": …}. It forks `processes` copies of
itself, none of which uses a GPU: they run Triton's own launcher up to the start, on a driver that
only names an architecture. So the results are in Triton's cache under the keys that real launches
use. When the input is closed, all processes end.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from triton.backends.nvidia import driver as nvidia
from triton.runtime import build, driver

from fastdiff.kernels.cached import SUFFIX, folder, key_of_module, modules_of, name_of, target
from fastdiff.kernels.jobs import Job, job_from, launch_of

_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


class Driver:
    """Replaces Triton's driver: an architecture instead of a device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton stores compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return target(self.arch)


def compiled(job: Job) -> str:
    """Compile a job, or find it in Triton's cache; returns its key."""
    driver.set_active(Driver(job.arch))
    launch = launch_of(job)
    kernel = launch.kernel.run(
        grid=launch.grid, warmup=True, **launch.arguments, **launch.constants, **launch.options
    )
    for name, source in modules_of(job).items():
        if not (folder() / key_of_module(source) / f"{name}{SUFFIX}").is_file():
            _build(name, source)
    return name_of(kernel.hash)


def _build(name: str, source: str) -> None:
    """Make Triton compile one of its C modules into its cache, without loading it."""
    build._load_module_from_path = lambda name, path: None
    with tempfile.TemporaryDirectory() as stub:
        try:
            places = nvidia.library_dirs()
        except (AssertionError, OSError, subprocess.SubprocessError):  # there is no NVIDIA driver
            _stub(Path(stub) / "libcuda.so.1")
            places = [stub]
        build.compile_module_from_src(
            src=source,
            name=name,
            library_dirs=places,
            include_dirs=nvidia.include_dirs,
            libraries=nvidia.libraries,
        )


def _stub(library: Path) -> None:
    """An empty library for the linker; the GPU's machine has the real one."""
    empty = library.with_suffix(".c")
    empty.write_text("")
    made = build._build(
        library.stem, str(empty), str(library.parent), [], [], [], [f"-Wl,-soname,{library.name}"]
    )
    Path(made).rename(library)


def main() -> None:
    told = json.loads(sys.stdin.readline())
    jobs = [job_from(job) for job in told["jobs"]]
    threading.Thread(target=_end_with_input, daemon=True).start()
    fork = get_context("fork")
    with ProcessPoolExecutor(told["processes"], fork, _quietly) as pool:
        waiting = {pool.submit(compiled, job): at for at, job in enumerate(jobs)}
        for future in as_completed(waiting):
            answer: dict[str, Any] = {"job": waiting[future]}
            try:
                answer["key"] = future.result()
            except Exception as error:
                lines = str(error).strip().splitlines()
                answer["error"] = f"{type(error).__name__}: {lines[0] if lines else ''}"
            with suppress(BrokenPipeError):
                sys.stdout.write(json.dumps(answer) + "\n")
                sys.stdout.flush()


def _quietly() -> None:
    """In each copy: end with the parent process, and keep stdout free for answers."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    os.dup2(2, 1)


def _end_with_input() -> None:
    while os.read(0, 1):  # not sys.stdin: a fork would inherit its lock
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
