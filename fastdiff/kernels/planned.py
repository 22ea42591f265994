"""The launches of our Triton kernels on a GPU, found on tensors without memory.

Within `Planning`, an op of ours on the meta device launches nothing; the launches of its plan are
noted. `distinct` keeps one for each kernel that Triton compiles separately.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.kernels.contract import Launch
from fastdiff.kernels.dispatch import Kernel, kernel_of

_aten = torch.ops.aten

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


class Planning(TorchDispatchMode):
    """Collects the `launches` of ops on the meta device, in order.

    arch: the GPU to plan for, as returned by `contract.architecture`.
    """

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch
        self.launches: list[Launch] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kernel := kernel_of(op):
            return self._ours(kernel, args, kwargs)
        name = op._schema.name.partition("::")[2]
        if op is _aten.convolution.default:
            return self.convolution(args)
        if name == "upsample_nearest2d":
            return self.enlargement(args[0], op(*args, **kwargs))
        with self:  # ops of ours call further ops
            result = op.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = op(*args, **kwargs)
        self.other(op, name, args, kwargs, result)
        return result

    def convolution(self, args: tuple[Any, ...]) -> Tensor:
        """The result of torch's convolution, channels last as for all pictures."""
        return channels_last(_aten.convolution.default(*args))

    def enlargement(self, x: Tensor, enlarged: Tensor) -> Tensor:
        """The result of torch's enlargement of x, channels last as on a GPU."""
        return channels_last(enlarged)

    def other(
        self, op: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Called for an op of torch that is not decomposed."""

    def planned(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], launches: tuple[Launch, ...]
    ) -> None:
        """Called for an op of ours."""
        self.launches += launches

    def _ours(self, kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "triton" not in kernel.implementations:
            with self:
                return kernel.library(*args, **kwargs)
        launcher: Any = kernel.implementations["triton"]()
        launches, outputs = launcher.plan(self.arch, *args, **kwargs)
        self.planned(kernel.spec.name, args, kwargs, launches)
        return outputs


def channels_last(picture: Tensor) -> Tensor:
    """A picture [B, C, Y, X] in the layout of cuDNN and torch's CUDA kernels, unlike meta's."""
    return picture.new_empty(picture.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    """The arguments of a launch, as Triton's launcher specialises a kernel for them.

    Returns:
        Types by name; the values that are compiled in (constexprs, absent tensors, integers that
        are 1); the names of integers and addresses that are known multiples of 16.
    """
    types: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    divisible = set()
    for name, value in launch.arguments.items():
        free = name in launch.unspecialised
        if value is None or (type(value) is int and value == 1 and not free):
            constants[name] = value
        elif isinstance(value, Tensor):
            types[name] = TYPES[value.dtype]
            # allocations are aligned, so only the offset in one matters
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.add(name)
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not free:
                divisible.add(name)
    return types, constants, frozenset(divisible)


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """The first launch of each kernel that Triton compiles separately, in order."""
    found: dict[Any, Launch] = {}
    for launch in launches:
        types, constants, divisible = specialised(launch)
        named = frozenset((name, type(value), value) for name, value in constants.items())
        key = (launch.kernel, frozenset(types.items()), named, divisible)
        found.setdefault((*key, launch.num_warps, launch.num_stages), launch)
    return list(found.values())
