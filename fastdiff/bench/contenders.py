"""Copies of one pipeline that run beside it, and the files that engines of it read."""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch


def sharing(pipe: Any) -> Any:
    """A deep copy whose weights are the pipeline's memory until they are moved or converted.

    For those who do not write into them: three networks of gigabytes then take the room of one.
    """
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    memo: dict[int, Any] = {}
    for module in modules:
        for tensor in chain(module.parameters(), module.buffers()):
            memo.setdefault(id(tensor), _alias(tensor))
    return copy.deepcopy(pipe, memo)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(tensor.data, tensor.requires_grad)
    return tensor.data


@contextmanager
def files(
    pipe: Any, engines: Path | None, log: Callable[[str], object]
) -> Iterator[Callable[[], tuple[Path, float]]]:
    """A function: the folder of ONNX files that engines read, and the seconds it took to make.

    `engines`, where it is given, in no time; else it is exported once, when it is first asked for,
    and removed in the end. UserError where it cannot be.
    """
    made: list[tuple[Path, float]] = [] if engines is None else [(engines, 0.0)]
    with tempfile.TemporaryDirectory(prefix="fastdiff-") as place:

        def folder() -> tuple[Path, float]:
            if not made:
                from fastdiff.compiler.engines import export

                start = time.perf_counter()
                export(sharing(pipe), Path(place), log)
                made.append((Path(place), time.perf_counter() - start))
            return made[0]

        yield folder
