"""One network of another runtime for one set of shapes, on memory that stays where it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def reason_of(error: Exception) -> str:
    """The last line of what a runtime says, for those before it name its own source files.

    Raises MemoryError where it says in its own words that there was no memory left.
    """
    words = str(error).strip() or type(error).__name__
    if isinstance(error, MemoryError) or "bad_alloc" in words:
        raise MemoryError(words) from error
    return words.splitlines()[-1]


@dataclass(frozen=True)
class Bound:
    """Fill `inputs`, call `run()`, read `outputs`; on a GPU in the order of torch's stream."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    run: Callable[[], None]


class Engine(Protocol):
    """A network in a file: an ONNX Runtime session or a TensorRT engine."""

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        ...

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph may hold its runs."""
        ...

    def refusal(self, inputs: Mapping[str, Sequence[int]]) -> str | None:
        """Why inputs of these shapes are too small or too large for it; None where they are not."""
        ...

    def bind(
        self, inputs: Mapping[str, Sequence[int]], outputs: Mapping[str, Sequence[int]]
    ) -> Bound:
        """Memory of these shapes by tensor name."""
        ...
