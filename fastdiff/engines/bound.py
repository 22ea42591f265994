"""A network of another runtime, bound to one set of shapes and fixed memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def reason_of(error: Exception) -> str:
    """The last line of a runtime's error; the lines before it name its own source files.

    Raises MemoryError if the message says that memory ran out.
    """
    words = str(error).strip() or type(error).__name__
    if isinstance(error, MemoryError) or "bad_alloc" in words:
        raise MemoryError(words) from error
    return words.splitlines()[-1]


@dataclass(frozen=True)
class Bound:
    """Fill `inputs`, call `run()`, read `outputs`; on a GPU all in the order of torch's stream."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    run: Callable[[], None]


class Engine(Protocol):
    """A network in a file: an ONNX Runtime session or a TensorRT engine."""

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        ...

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph may hold its runs."""
        ...

    def refusal(self, inputs: Mapping[str, Sequence[int]]) -> str | None:
        """Why inputs of these shapes are too small or too large; None if they are not."""
        ...

    def bind(
        self, inputs: Mapping[str, Sequence[int]], outputs: Mapping[str, Sequence[int]]
    ) -> Bound:
        """Allocate inputs and outputs of these shapes, by tensor name."""
        ...
