"""Describes what Triton has to compile as plain JSON, for another process.

A `Job` holds exactly what Triton's launcher reads from a launch. `launch_of` makes a launch of the
same specialisation, whose tensors are addresses without memory.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastdiff.kernels.contract import Launch
from fastdiff.kernels.dispatch import module_of
from fastdiff.kernels.planned import TYPES, specialised

_DTYPES = {name: dtype for dtype, name in TYPES.items()}
_INTEGERS = {  # by type, and whether it is a multiple of 16
    ("i32", True): 16,
    ("i32", False): 2,
    ("i64", True): 2**40,
    ("i64", False): 2**40 + 2,
}


@dataclass(frozen=True)
class Job:
    """One specialisation of a kernel for one architecture."""

    arch: int
    module: str
    kernel: str
    types: Mapping[str, str]
    """Types of the run-time arguments in Triton's notation: "*fp16", "i32"."""
    divisible: tuple[str, ...]
    """The arguments that are multiples of 16."""
    constants: Mapping[str, int | float | bool | None]
    """The values that are compiled in."""
    num_warps: int
    num_stages: int

    def json(self) -> dict[str, Any]:
        return asdict(self)


def job_of(launch: Launch, arch: int) -> Job:
    """The job to compile before `launch` can start on an architecture."""
    types, constants, divisible = specialised(launch)
    function = launch.kernel.fn
    return Job(
        arch,
        function.__module__,
        function.__qualname__,
        types,
        tuple(sorted(divisible)),
        constants,
        launch.num_warps,
        launch.num_stages,
    )


def job_from(told: Mapping[str, Any]) -> Job:
    """The inverse of `Job.json`."""
    return Job(**{**told, "divisible": tuple(told["divisible"])})


class _Address:
    """The part of a tensor that Triton's launcher reads."""

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype = dtype
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def kernel_of(job: Job) -> Any:
    """The job's kernel, as `triton.jit` made it."""
    return getattr(module_of(job.module), job.kernel)


def launch_of(job: Job) -> Launch:
    """A launch that Triton specialises in the same way; it must not be started."""
    arguments: dict[str, Any] = {}
    for name, kind in job.types.items():
        divisible = name in job.divisible
        if kind in _DTYPES:
            arguments[name] = _Address(_DTYPES[kind], 4096 if divisible else 4098)
        else:
            arguments[name] = _INTEGERS[kind, divisible]
    constants: Any = job.constants  # absent tensors and integers that are 1 are compiled in, too
    return Launch(kernel_of(job), arguments, constants, (1,), job.num_warps, job.num_stages)
