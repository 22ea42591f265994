"""Remembers the modules that `compile` changed, in case they are replaced or wrapped later."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from fastdiff.families import plain

_TAKEN: weakref.WeakKeyDictionary[Any, list[weakref.ref[nn.Module]]] = weakref.WeakKeyDictionary()
"""By pipeline or bare model; holds neither it nor its modules alive."""


def torch_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has compiled `module`, by a wrapper or in place."""
    return plain(module) is not module or vars(module).get("_compiled_call_impl") is not None


def remember(target: Any, modules: Iterable[nn.Module]) -> None:
    """Note that modules of `target` were compiled, so that `restore` finds them even if they are
    replaced or wrapped."""
    known = _TAKEN.setdefault(plain(target), [])
    known[:] = [ref for ref in known if ref() is not None]
    known += map(weakref.ref, modules)


def remembered(target: Any) -> list[nn.Module]:
    """The modules that were compiled with `target` and still exist."""
    return [module for ref in _TAKEN.get(plain(target), []) if (module := ref()) is not None]


def forget(target: Any) -> None:
    """Undo `remember`."""
    _TAKEN.pop(plain(target), None)
