"""A dispatch mode that counts torch's launches, bytes and FLOPs."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format as _layout
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fastdiff.kernels.dispatch import Kernel, kernel_of

KINDS = ("attention", "conv", "linear", "norm", "pointwise", "copy", "step", "host read", "other")

_aten = torch.ops.aten
FORMULAS: dict[Any, Any] = flop_registry | {  # torch's table has no entry for the CPU's attention
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _aten._scaled_dot_product_flash_attention
    ],
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten._addmm_activation: flop_registry[_aten.addmm],
    # its third argument may be the result's dtype, which torch takes for a shape
    _aten.bmm: lambda a, b, *_, **__: 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2],
}
_KIND_OF = {
    name: kind
    for kind, names in {
        "attention": "_softmax softmax",
        "conv": "convolution conv2d",
        "linear": "mm addmm addmm_ _addmm_activation bmm baddbmm linear geglu",
        "norm": "native_group_norm native_layer_norm group_norm_silu ada_norm qk_norm moments"
        " line_silu",
        "pointwise": "gelu_gate residual mean_pool avg_pool2d",
        "copy": "cat concat clone copy_ _to_copy repeat index embedding upsample_nearest2d",
        "step": "guided_step",
        "host read": "_local_scalar_dense",
    }.items()
    for name in names.split()
}
COMPUTED = 1 << 20
"""FLOPs up to which a product is computed on a CPU: a scheduler branches on its own products, but
nothing branches on a network's outputs."""
_OVERWRITING = ("copy_", "fill_", "zero_", "normal_", "uniform_")
"""In-place ops that do not read what they overwrite."""


@dataclass(frozen=True)
class Tally:
    """Launches, the bytes that they read and write, and the FLOPs of products and convolutions."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0

    def plus(self, other: "Tally", times: int = 1) -> "Tally":
        return Tally(
            self.launches + times * other.launches,
            self.bytes + times * other.bytes,
            self.flops + times * other.flops,
        )


Work = Mapping[str, Tally]
"""By kind of op, without kinds that do not occur."""


def total(work: Work) -> Tally:
    return reduce(Tally.plus, work.values(), Tally())


class Counter(TorchDispatchMode):
    """Counts this thread's ops that run on `device`.

    `called`: names of the C++ kernels called in the meantime, which `counting` does not compute.
    `blocks`: the same tallies by the current `block`, which `watching` sets.
    """

    def __init__(self, device: torch.device, called: list[str]) -> None:
        super().__init__()
        self.work: defaultdict[str, Tally] = defaultdict(Tally)
        self.blocks: defaultdict[str, Tally] = defaultdict(Tally)
        self.block = ""
        self._device = device.type
        self._called = called

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kernel := kernel_of(op):
            return self._ours(kernel, args, kwargs)
        formula = FORMULAS.get(op.overloadpacket)
        if formula is None:
            with self:  # under inference_mode composite ops arrive here
                result = op.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            result, flops = op(*args, **kwargs), 0
        else:
            result, flops = self._product(op, formula, args, kwargs)
        self._tally(op, args, kwargs, result, flops)
        return result

    def _product(self, op: Any, formula: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
        """The result of `op`, or zeros in the same layout if computing it would take long."""
        if self._device != "cpu":
            result = op(*args, **kwargs)
            return result, int(formula(*args, **kwargs, out_val=result))
        shape = op(*tree_map(_meta, args), **tree_map(_meta, kwargs))
        if op is _aten.convolution.default and torch.channels_last in map(_layout, args[:2]):
            # without values the layout is lost
            shape = shape.contiguous(memory_format=torch.channels_last)
        flops = int(formula(*args, **kwargs, out_val=shape))
        return tree_map(_zeros, shape) if flops > COMPUTED else op(*args, **kwargs), flops

    def _ours(self, kernel: Kernel, args: tuple[Any, ...], kwargs: Any) -> Any:
        if self._device == "cuda" and "triton" in kernel.implementations:
            result = kernel.op(*args, **kwargs)
        else:
            before = len(self._called)
            run = kernel.implementations["cpu"]() if self._device == "cpu" else kernel.library
            with self:  # the ops of plain torch count one by one
                result = run(*args, **kwargs)
            if len(self._called) == before:
                return result
            for fresh in _fresh(args, kwargs, result):
                fresh.zero_()
        with FlopCounterMode(display=False) as counter:
            kernel.spec.reference(*tree_map(_meta, args), **tree_map(_meta, kwargs))
        self._tally(kernel.op, args, kwargs, result, counter.get_total_flops())
        return result

    def _tally(self, op: Any, args: Any, kwargs: Any, result: Any, flops: int) -> None:
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if not any(tensor.device.type == self._device for tensor in tensors):
            return  # a scheduler's arithmetic on the host
        name = op._schema.name.partition("::")[2]
        if only_memory(op, name):
            return
        read, written = moved(op, name, args, kwargs, result)
        if written or name == "_local_scalar_dense":
            kind, launch = _kind(op, name), Tally(1, read + written, flops)
            self.work[kind] = self.work[kind].plus(launch)
            self.blocks[self.block] = self.blocks[self.block].plus(launch)


def only_memory(op: Any, name: str) -> bool:
    """Whether an op only allocates memory or makes a view, and launches nothing."""
    return name.startswith(("empty", "new_empty")) or torch.Tag.inplace_view in op.tags


def moved(op: Any, name: str, args: Any, kwargs: Any, result: Any) -> tuple[int, int]:
    """The bytes that an op reads and writes: each of its tensors once per argument."""
    read, written = 0, sum(map(bytes_of, _fresh(args, kwargs, result)))
    for position, argument in enumerate(op._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        size = sum(bytes_of(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
        writes = argument.alias_info is not None and argument.alias_info.is_write
        written += size if writes else 0
        read += 0 if writes and (argument.is_out or name in _OVERWRITING) else size
    return read, written


def bytes_of(tensor: Tensor) -> int:
    """The bytes of the elements in memory: an expanded dimension counts once."""
    if tensor.numel() == 0:
        return 0
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in pairs if stride) * tensor.element_size()


def _fresh(args: Any, kwargs: Any, result: Any) -> list[Tensor]:
    """The tensors of `result` that share no argument's memory; schemas do not always say so."""
    given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    return [tensor for tensor in results if _storage(tensor) not in given]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _kind(op: Any, name: str) -> str:
    if name in _KIND_OF:
        return _KIND_OF[name]
    if "attention" in name:
        return "attention"
    return "pointwise" if torch.Tag.pointwise in op.tags else "other"


def _meta(value: Any) -> Any:
    """A float tensor without its values; integer tensors stay, since indices are read."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _zeros(shape: Any) -> Any:
    """Zeros on the CPU, with the strides of a tensor that has no values."""
    if not isinstance(shape, Tensor):
        return shape
    return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype).zero_()
