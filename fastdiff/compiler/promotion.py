"""When float16 overflows: find the layer, and compute that network in float32 from then on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastdiff.models.watch import Unwritten, version


@dataclass(frozen=True)
class Promotion:
    """A network on a float32 copy of its module."""

    network: Any
    module: nn.Module
    version: int
    """`Slot.version` when the weights were copied."""
    unwritten: Unwritten
    """Detects writes through `.data`, which `version` misses."""


def overflowed(values: Any) -> bool:
    """Whether a float16 tensor in `values` holds an infinity or a NaN; waits for the device."""
    half = [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.dtype == torch.float16]
    return not all(bool(tensor.isfinite().all()) for tensor in half)


def as_type(values: Any, given: torch.dtype, wanted: torch.dtype) -> Any:
    """`values` with its tensors of one dtype cast to another."""

    def cast(value: Any) -> Any:
        return value.to(wanted) if isinstance(value, Tensor) and value.dtype == given else value

    return tree_map(cast, values)


def version_of(module: nn.Module) -> int:
    """A number that grows with every in-place edit of a parameter that autograd sees."""
    return sum(version(parameter) or 0 for parameter in module.parameters())


def scaled_alike(module: nn.Module, other: nn.Module) -> None:
    """Copy the scales of IP-Adapter processors from `module` to `other`, a copy of it."""
    for own, copied in zip(module.modules(), other.modules(), strict=True):
        read: Any = getattr(own, "processor", None)
        shown: Any = getattr(copied, "processor", None)
        if hasattr(read, "scale"):
            shown.scale = read.scale


def first_overflow(
    module: nn.Module, call: Callable[[], Any], others: Mapping[str, nn.Module] | None = None
) -> str:
    """The name of the layer of `module` that gives the first non-finite output in `call()`, or of
    one of `others`, by name."""
    with _Watch({"": module, **(others or {})}) as watch:
        call()
    return watch.where or "its input"


class _Watch(TorchDispatchMode):
    """Checks the output of every kernel; the weights that a kernel reads identify its layer."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._layers = {
            parameter.data_ptr(): name.rpartition(".")[0]
            for own, module in modules.items()
            for name, parameter in module.named_parameters(own)
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
            # attention and some others read no weights
            self._last = named[0] if named else self._last
            if overflowed(result):
                self.where = self._last
        return result
