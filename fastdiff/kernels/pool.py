"""Compiling kernels in processes of their own, which need no GPU and know of none here."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from fastdiff.kernels.jobs import Job


@dataclass(frozen=True)
class Answer:
    """What became of a job: its key in Triton's cache, or why it has none."""

    at: int
    """Its place among the jobs."""
    job: Job
    key: str | None
    error: str | None


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def compile_jobs(
    jobs: Sequence[Job], environment: Mapping[str, str] | None = None
) -> Iterator[Answer]:
    """Compile jobs into Triton's cache, a process on each core; each answer as it is there.

    The processes are started by one that this one starts anew (never forked from it, for a copy of
    a process with CUDA cannot use it), and end with it. environment: beside this process's own.
    """
    left = set(range(len(jobs)))
    own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    told = {"processes": min(len(jobs), cores()), "jobs": [job.json() for job in jobs]}
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "fastdiff.kernels.worker"],
            env={**os.environ, **own, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is for the caller
            text=True,
        ) as worker:
            assert worker.stdin is not None
            assert worker.stdout is not None
            try:
                with suppress(BrokenPipeError):  # it ended; what is left says so
                    worker.stdin.write(json.dumps(told) + "\n")
                    worker.stdin.flush()
                for line in worker.stdout:
                    answer = json.loads(line)
                    at = answer["job"]
                    left.discard(at)
                    yield Answer(at, jobs[at], answer.get("key"), answer.get("error"))
            finally:
                worker.kill()
                with suppress(BrokenPipeError):  # closing writes what it did not take
                    worker.stdin.close()
        errors.seek(0)
        last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
        for at in sorted(left):
            why = f"the process that compiles ended{f': {last[0]}' if last else ''}"
            yield Answer(at, jobs[at], None, why)
