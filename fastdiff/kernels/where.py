"""Whether what decides by device decides as on a GPU or as on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_META_IS_CPU: ContextVar[bool] = ContextVar("meta_is_cpu", default=False)


def on_gpu(tensor: Tensor) -> bool:
    """Whether what decides by device decides as on a GPU. A tensor without memory (on the meta
    device) stands for one that is there, so a GPU's launches are found without one; within
    `planned_on_cpu` for one on a CPU."""
    device = tensor.device.type
    return device == "cuda" or (device == "meta" and not _META_IS_CPU.get())


@contextmanager
def planned_on_cpu() -> Iterator[None]:
    """Within it tensors without memory stand for ones on a CPU."""
    token = _META_IS_CPU.set(True)
    try:
        yield
    finally:
        _META_IS_CPU.reset(token)
