"""Copies of a pipeline that share its memory, and exported files for engines."""

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
    """A deep copy that uses the pipeline's weights until they are moved or converted.

    For backends that do not write to weights: three copies then need the memory of one.
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
    """Yield a function that returns the folder of ONNX files for engines, and its export time in s.

    The folder is `engines`, in no time, or else it is exported at the first call and removed at the
    end. UserError if the export fails.
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
