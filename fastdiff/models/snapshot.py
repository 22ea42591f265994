"""Everything that a module's own `forward` reads, as one value that compares and hashes."""

import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastdiff.models.originals import reached
from fastdiff.models.watch import Item, Unsupported, kind, replaced, version, watch

_SCALARS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_OWN = frozenset(vars(nn.Module())) | {"forward"}
"""What every module has, and the method that is checked apart."""
_OFFLOAD = frozenset({"_hf_hook", "_old_forward"})
"""What accelerate leaves in a module that it moves."""
_EVEN = (nn.Linear, nn.Identity, nn.ModuleDict, nn.ParameterDict)
"""Parts of adapters without dropout, which peft leaves in training mode, as it does its layers."""
_SAMPLES = 64
"""How many values of each weight are compared."""


def offload(module: nn.Module) -> Any:
    """accelerate's hook that moves the whole module to its device before a call (diffusers'
    `enable_model_cpu_offload`); None if there is no such hook."""
    hook = vars(module).get("_hf_hook")
    own = getattr(vars(module).get("_old_forward"), "__func__", None) is type(module).forward
    return hook if own and kind(hook) == "accelerate.hooks.CpuOffload" else None


def snapshot(
    root: nn.Module, packages: tuple[str, ...] = (), without: tuple[str, ...] = ()
) -> tuple[Any, ...]:
    """The modules, settings and weights of `root`, as they are now.

    Two snapshots are equal only if the module computes the same from the same arguments. Between
    them every weight stayed the same memory; where accelerate moves the whole module, it stayed the
    same parameter. In-place edits count by autograd's versions. A write through `.data` changes no
    version, and is found by values: 64 that are spread over each weight. (A partial write through
    `.data` may go unnoticed.) A snapshot keeps no module and no weight alive.

    packages: whose functions are followed, as in `originals.reached`.
    without: attributes that do not count.

    Raises:
        Unsupported: no snapshot says what the module computes; the message says why.
    """
    modules = dict(root.named_modules())
    for module in modules.values():
        if module.training and type(module) not in _EVEN and not kind(module).startswith("peft."):
            raise Unsupported("a module in training mode")
    moved = offload(root)
    for module in modules.values():
        _check_hooks(module, packages, moved is not None and module is root)
    code = reached({type(module) for module in modules.values()}, packages=packages)
    for module in modules.values():
        for name in code.names & vars(module).keys() - _OWN:
            if callable(getattr(type(module), name, None)):
                raise Unsupported(f"a {kind(module)} with a {name} of its own")
    weights = [*root.parameters(), *root.buffers()]
    device = None if moved is None else torch.device(moved.execution_device)
    return (
        device,
        tuple((type(m), m.training, *_settings(m, without)) for m in modules.values()),
        tuple(_weight(weight, moved is not None) for weight in weights),
        _samples(weights),
    )


class Unchanged:
    """Tells in a fraction of the time whether `snapshot(root, …)` would be what it was when this
    was made. Keeps the modules alive, not the weights' memory."""

    def __init__(
        self, root: nn.Module, packages: tuple[str, ...] = (), without: tuple[str, ...] = ()
    ) -> None:
        self._items: list[Item] = []
        self._dicts: list[dict[Any, Any]] = []
        self._rows: list[tuple[Any, tuple[Any, ...]]] = []
        modules = list(root.modules())
        for module in modules:
            self._add_module(module, without)
        self._watch = watch(modules, self._items, self._dicts)
        classes = {type(module) for module in modules}
        self._code = lambda: reached(classes, packages=packages)
        self._reached = self._code()
        self._weights = [*root.parameters(), *root.buffers()]
        for weight in self._weights:
            _check_plain(weight)
        self._moved = offload(root) is not None
        self._state = self._read()

    def holds(self) -> bool:
        try:
            return (
                bool(self._watch.intact())
                and all(_identical(row, kept) for row, kept in self._rows)
                and self._code() is self._reached
                and self._read() == self._state
            )
        except Unsupported:
            return False

    def _add_module(self, module: nn.Module, without: tuple[str, ...]) -> None:
        own = vars(module)
        self._dicts += [own, module._forward_hooks, module._forward_pre_hooks, module._buffers]
        self._items += [(module._buffers, *item) for item in module._buffers.items()]
        for name in {"training", "forward"} | (own.keys() - _OWN - {*without}):
            self._items.append((own, name, own.get(name)))
            self._add(own.get(name))

    def _add(self, value: Any) -> None:
        """Watch what is in a module's attribute."""
        if isinstance(value, dict):
            self._dicts.append(value)
            self._items += [(value, *item) for item in value.items()]
            for item in value.values():
                self._add(item)
        elif isinstance(value, list | tuple | set):
            if not isinstance(value, tuple):
                self._rows.append((value, tuple(value)))
            for item in value:
                self._add(item)
        elif hasattr(value, "to_dict") and not isinstance(value, nn.Module):
            self._add(vars(value))

    def _read(self) -> tuple[Any, ...]:
        weights = self._weights
        where = [
            (w.data_ptr(), w.untyped_storage()._cdata, w.stride())
            for w in weights
            if not self._moved
        ]
        what = [(w._version, w.shape, w.dtype) for w in weights]
        return what, where, _samples(weights)


def _identical(row: Any, kept: tuple[Any, ...]) -> bool:
    return len(row) == len(kept) and all(map(operator.is_, row, kept))


def by_value(value: Any) -> Any:
    """An argument of a call as a value that compares and hashes: a tensor by its numbers, type and
    device. Waits for the device. Raises Unsupported for objects that are not plain values."""
    if type(value) is Tensor and value.layout == torch.strided and not value.is_meta:
        numbers = value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
        return value.shape, value.dtype, value.device, numbers
    if isinstance(value, _SCALARS):
        return type(value), value
    if type(value) in (list, tuple):
        return type(value), tuple(map(by_value, value))
    raise Unsupported(f"an argument that is a {kind(value)}")


def _check_hooks(module: nn.Module, packages: tuple[str, ...], moved: bool) -> None:
    """Raise Unsupported if a module has a hook that its library did not put there."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        home = str(getattr(hook, "__globals__", {}).get("__name__"))
        if home.partition(".")[0] not in packages:
            raise Unsupported("a hook that wraps one of its modules")
    if not moved and replaced(module, "forward"):
        raise Unsupported("a hook that wraps one of its modules")


def _settings(module: nn.Module, without: tuple[str, ...]) -> tuple[Any, ...]:
    own = vars(module)
    children = tuple((name, _Same(child)) for name, child in module._modules.items())
    kept = own.keys() - _OWN - _OFFLOAD - {*without}
    return children, tuple((name, _setting(own[name])) for name in sorted(kept))


def _setting(value: Any) -> Any:
    """A module's attribute: plain values by value, objects as the very object."""
    if isinstance(value, _SCALARS):
        return type(value), value
    if isinstance(value, dict):
        return type(value), tuple((_setting(k), _setting(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_setting, value))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(_setting, value))
    if isinstance(value, Tensor):
        return _weight(value, moved=False)
    if hasattr(value, "to_dict"):  # a config of transformers, which users edit in place
        return _Same(value), _setting(vars(value))
    return _Same(value)


class _Same:
    """Equal for the same object only, and, if that can be helped, does not keep it alive."""

    __slots__ = ("_id", "_ref")

    def __init__(self, thing: Any) -> None:
        self._id = id(thing)
        try:
            self._ref: Callable[[], Any] = weakref.ref(thing)
        except TypeError:
            self._ref = lambda: thing

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self._id != other._id:
            return False
        thing = self._ref()
        return thing is not None and thing is other._ref()

    def __hash__(self) -> int:
        return self._id


def _weight(tensor: Tensor, moved: bool) -> Any:
    _check_plain(tensor)
    what = _Same(tensor), tensor._version, tensor.shape, tensor.dtype
    if moved:
        return what
    memory = StorageWeakRef(tensor.untyped_storage())
    return *what, memory, tensor.data_ptr(), tensor.stride(), tensor.device


def _check_plain(tensor: Tensor) -> None:
    """Raise Unsupported for weights whose edits cannot be seen."""
    if type(tensor) not in (nn.Parameter, Tensor) or tensor.layout != torch.strided:
        raise Unsupported(f"weights kept as {kind(tensor)}, not as plain numbers")
    if tensor.is_meta:
        raise Unsupported("weights on the meta device")
    if version(tensor) is None:
        raise Unsupported("weights made in torch.inference_mode, whose edits torch does not count")


def _samples(tensors: Iterable[Tensor]) -> tuple[bytes, ...]:
    """Values that are spread over each tensor; waits for the device."""
    found: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if count := tensor.numel():
            step = -(-count // _SAMPLES)
            # `data`, not `detach()`: also fit for torch.inference_mode
            spread = tensor.data.as_strided((-(-count // step),), (step,), tensor.storage_offset())
            found.setdefault((tensor.device, tensor.dtype), []).append(spread)
    joined = (torch.cat(views).cpu() for views in found.values())
    return tuple(values.view(torch.uint8).numpy().tobytes() for values in joined)
