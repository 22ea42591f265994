"""Checks many "is this still the same object" conditions at once, before every step."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.kernels.dispatch import NATIVE

Item = tuple[dict[str, Any], str, Any]
"""A dict, a key, and the value that must stay there; None also stands for a missing key."""

_PROBE = 64
"""How many leading values of a tensor are compared."""

_VERSION = operator.attrgetter("_version")


class Unsupported(ValueError):
    """The runtime does not compute this module or call; the message says why."""


def kind(thing: Any) -> str:
    """The name of the object's class, by `class_name`: others reuse torch's and diffusers'
    names."""
    return class_name(type(thing))


def class_name(cls: type) -> str:
    """The class's name, with its path unless it is torch's or diffusers'."""
    path, name = cls.__module__, cls.__name__
    return name if path.split(".")[0] in ("torch", "diffusers") else f"{path}.{name}"


def watch(
    modules: Sequence[nn.Module],
    items: Iterable[Item] = (),
    dicts: Iterable[dict[Any, Any]] = (),
    things: Iterable[Any] = (),
) -> Any:
    """Watch the class, children and parameters of each module, and `items`.

    Args:
        items: other values that must stay the same.
        dicts: further dicts that must keep their number of keys.
        things: other objects that must keep their class.

    Returns:
        An object whose `intact()` says whether all of that still holds.
    """
    items, dicts = list(items), list(dicts)
    for module in modules:
        for kept in (module._modules, module._parameters):
            items += [(kept, name, value) for name, value in kept.items()]
            dicts.append(kept)
    kind = _SlowWatch if NATIVE is None else NATIVE.Watch
    return kind(items, [*modules, *things], dicts)


def hooks(modules: Iterable[nn.Module]) -> list[dict[int, Any]]:
    """The dicts that would hold forward hooks; raises Unsupported if there is a hook."""
    modules = list(modules)
    found: list[Any] = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
    if any(found) or any(replaced(module, "forward") for module in modules):
        raise Unsupported("a hook that wraps one of its modules")
    return found


def replaced(thing: Any, name: str) -> bool:
    """Whether an attribute hides the class's method; a removed hook may leave that method
    itself."""
    own = vars(thing).get(name)
    left = getattr(own, "__func__", None) is getattr(type(thing), name)
    return own is not None and not (left and getattr(own, "__self__", None) is thing)


def version(tensor: Tensor) -> int | None:
    """A number that grows with every in-place edit that autograd sees. None if torch does not count
    them: for tensors made in inference mode, even after they have got other memory."""
    try:
        return tensor._version
    except RuntimeError:
        return None


class Unwritten:
    """Checks whether tensors are where they were and hold what they held.

    Address and version reveal most writes. Writes through `.data` change neither, so the first
    values are compared, too: PEFT's hotswap and fuse write whole tensors that way. (A partial write
    through `.data` may go unnoticed.)
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._versioned = [tensor for tensor in self._tensors if version(tensor) is not None]
        self._versions = [tensor._version for tensor in self._versioned]
        firsts = [_first(tensor) for tensor in self._tensors]
        # the views keep the memory from being reused
        self._here = [f.view(torch.uint8).numpy().data for f in firsts if f.device.type == "cpu"]
        self._there = [first for first in firsts if first.device.type != "cpu"]
        self._values = self._read()

    def are(self, tensors: Iterable[Tensor]) -> bool:
        """Whether these are the same tensors."""
        return [*map(id, self._tensors)] == [*map(id, tensors)]

    def hold(self) -> bool:
        return (
            [*map(Tensor.data_ptr, self._tensors)] == self._addresses
            and [*map(_VERSION, self._versioned)] == self._versions
            and self.values_hold()
        )

    def values_hold(self) -> bool:
        """Compare only the first values; waits for the device."""
        (here, there), (before, then) = self._read(), self._values
        if here != before:
            return False
        if there is None or then is None:
            return True
        # compares bytes, so that a NaN equals itself
        return torch.equal(there.view(torch.uint8), then.view(torch.uint8))

    def _read(self) -> tuple[bytes, Tensor | None]:
        # runs before every step: bytes.join takes 30 ns per tensor, torch.cat 400
        return b"".join(self._here), torch.cat(self._there) if self._there else None


def _first(tensor: Tensor) -> Tensor:
    """A view of the first values in a tensor's memory, which it keeps alive."""
    count = min(_PROBE, tensor.numel())
    # `data`, not `detach()`: the latter fails for tensors without versions
    return tensor.data.as_strided((count,), (1,), tensor.storage_offset())


class _SlowWatch:
    """Replaces `fastdiff._C.Watch` if that was not built."""

    def __init__(self, items: list[Any], objects: list[Any], dicts: list[Any]) -> None:
        self._items, self._dicts = items, [(names, len(names)) for names in dicts]
        self._types = [(thing, type(thing)) for thing in objects]

    def intact(self) -> bool:
        return (
            all(names.get(key) is value for names, key, value in self._items)
            and all(type(thing) is known for thing, known in self._types)
            and all(len(names) == count for names, count in self._dicts)
        )
