"""Whether device-dependent decisions are made as on a GPU or as on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_META_IS_CPU: ContextVar[bool] = ContextVar("meta_is_cpu", default=False)


def on_gpu(tensor: Tensor) -> bool:
    """Whether to decide as on a GPU. A tensor without memory (on the meta device) counts as one on
    a GPU, so that a GPU's launches can be found without one; within `planned_on_cpu`, as one on a
    CPU."""
    device = tensor.device.type
    return device == "cuda" or (device == "meta" and not _META_IS_CPU.get())


@contextmanager
def planned_on_cpu() -> Iterator[None]:
    """In this block tensors without memory count as tensors on a CPU."""
    token = _META_IS_CPU.set(True)
    try:
        yield
    finally:
        _META_IS_CPU.reset(token)
