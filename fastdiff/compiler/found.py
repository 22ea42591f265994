"""Finding what `compile` has taken, wherever it was put since."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from fastdiff.families import plain

_TAKEN: weakref.WeakKeyDictionary[Any, list[weakref.ref[nn.Module]]] = weakref.WeakKeyDictionary()
"""By pipeline or bare model; neither it nor its modules live any longer for it."""


def torch_compiled(module: nn.Module) -> bool:
    """Whether calls of `module` run what torch.compile made of it: a wrapper, or in place."""
    return plain(module) is not module or vars(module).get("_compiled_call_impl") is not None


def remember(target: Any, modules: Iterable[nn.Module]) -> None:
    """Note that modules of `target` were compiled: they may be replaced or wrapped before they are
    restored."""
    known = _TAKEN.setdefault(plain(target), [])
    known[:] = [ref for ref in known if ref() is not None]
    known += map(weakref.ref, modules)


def remembered(target: Any) -> list[nn.Module]:
    """The modules that were compiled with `target` and are still there."""
    return [module for ref in _TAKEN.get(plain(target), []) if (module := ref()) is not None]


def forget(target: Any) -> None:
    """Undo `remember`."""
    _TAKEN.pop(plain(target), None)
