"""When float16 overflows: say where, and compute that part in float32 from then on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastdiff.models.watch import Unwritten, version


@dataclass(frozen=True)
class Promotion:
    """A part's network on a float32 copy of its module."""

    network: Any
    module: nn.Module
    version: int
    """State of the module's weights when they were copied."""
    unwritten: Unwritten
    """Tells what `version` does not: writes through `.data`."""


def overflowed(values: Any) -> bool:
    """Whether a float16 tensor among `values` holds an infinity or a NaN; waits for the device."""
    half = [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.dtype == torch.float16]
    return not all(bool(tensor.isfinite().all()) for tensor in half)


def as_type(values: Any, given: torch.dtype, wanted: torch.dtype) -> Any:
    """`values` with the tensors of one dtype cast to another."""

    def cast(value: Any) -> Any:
        return value.to(wanted) if isinstance(value, Tensor) and value.dtype == given else value

    return tree_map(cast, values)


def version_of(module: nn.Module) -> int:
    """Grows with every edit in place of a parameter that autograd can see."""
    return sum(version(parameter) or 0 for parameter in module.parameters())


def scaled_alike(module: nn.Module, other: nn.Module) -> None:
    """Let `other`, a copy of `module`, have the scales that IP-Adapters' processors have there."""
    for own, copied in zip(module.modules(), other.modules(), strict=True):
        read: Any = getattr(own, "processor", None)
        shown: Any = getattr(copied, "processor", None)
        if hasattr(read, "scale"):
            shown.scale = read.scale


def first_overflow(module: nn.Module, call: Callable[[], Any]) -> str:
    """Name of the layer of `module` whose output is the first in `call()` that is not finite."""
    with _Watch(module) as watch:
        call()
    return watch.where or "its input"


class _Watch(TorchDispatchMode):
    """Looks at the output of every kernel of ours; a kernel goes by the weights that it reads."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._layers = {
            parameter.data_ptr(): name.rpartition(".")[0]
            for name, parameter in module.named_parameters()
        }
        self._last = ""
        self.where: str | None = None

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        if op.namespace == "fastdiff" and self.where is None:
            addresses = [t.data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)]
            named = [self._layers[address] for address in addresses if address in self._layers]
            self._last = named[0] if named else self._last  # attention and others read no weights
            if overflowed(result):
                self.where = self._last
        return result
