"""Compiles kernels for GPUs that need not be there: `python -m fastdiff.kernels.worker`.

One line of JSON comes in, {"processes": n, "jobs": [...]} (`jobs.Job`); a line goes out for each
job as it ends, {"job": at, "key": …} or {"job": at, "error": …}. The process forks `processes`
copies of itself, none of which ever asks for a GPU: Triton's own launcher runs up to the start, on
a driver that only says which architecture there is. What it compiles lies in Triton's cache under
the key by which the same launch looks there. When the input is closed, all of them end.
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
    """Stands for Triton's driver: an architecture instead of a device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return target(self.arch)


def compiled(job: Job) -> str:
    """Compile a job, or find it in Triton's cache; its key there."""
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
    """Have Triton compile a module of its own into its cache; it is not loaded here."""
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
    """A library without functions for the linker: those of the GPU's machine are used there."""
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
    """In each copy: end with the process that made it, and say nothing where answers go."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    os.dup2(2, 1)


def _end_with_input() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock a copy would inherit
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
