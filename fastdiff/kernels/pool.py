"""Compiles kernels in separate processes, which need no GPU and do not see one."""

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
    """The result of a job: its key in Triton's cache, or an error."""

    at: int
    """The job's index."""
    job: Job
    key: str | None
    error: str | None


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def compile_jobs(
    jobs: Sequence[Job], environment: Mapping[str, str] | None = None
) -> Iterator[Answer]:
    """Compile jobs into Triton's cache, one process per core; yields each answer when it is ready.

    A new process starts the workers, since one forked from a process with CUDA cannot use it; all
    end with this process. environment: variables to add to this process's own.
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
                with suppress(BrokenPipeError):  # it has ended, which is reported below
                    worker.stdin.write(json.dumps(told) + "\n")
                    worker.stdin.flush()
                for line in worker.stdout:
                    answer = json.loads(line)
                    at = answer["job"]
                    left.discard(at)
                    yield Answer(at, jobs[at], answer.get("key"), answer.get("error"))
            finally:
                worker.kill()
                with suppress(BrokenPipeError):  # closing flushes what it did not read
                    worker.stdin.close()
        errors.seek(0)
        last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
        for at in sorted(left):
            why = f"the process that compiles ended{f': {last[0]}' if last else ''}"
            yield Answer(at, jobs[at], None, why)
