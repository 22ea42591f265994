"""Whether the code of modules is what torch and diffusers came with.

A compact network stands for what their functions compute. So every function that a call of the
modules can reach by its name must be theirs: not a subclass's, not a patch of a class, of a module
or of `torch.nn.functional`. What was found is watched by identity afterwards.
"""

import copyreg
import gc
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property, partial, partialmethod
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from fastdiff.models.watch import Item, Unsupported, watch

PACKAGES = ("torch", "diffusers", "peft")
"""Whose code compact networks stand for."""

_ENTRIES = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "forward")
_KNOWN = {*PACKAGES, *sys.stdlib_module_names, "numpy", "packaging", "typing_extensions"}
"""Those, and the packages that they call for what is no part of a picture."""


class Reached(NamedTuple):
    """What calls of some classes can reach by name."""

    items: list[Item]
    """Every function, and every other value of a class, where it lies."""
    dicts: list[dict[str, Any]]
    """Those of the classes: a function that is added to one could hide another's."""
    names: frozenset[str]
    """Of all that code, as attributes or globals."""


_FOUND: dict[frozenset[type], tuple[Reached, Any]] = {}
"""What was found before, and what watches whether it still is so."""


def reached(classes: Iterable[type]) -> Reached:
    """Follow the calls of objects of `classes`, by name, through their classes and modules.

    A name counts wherever a class has it, whatever object it is asked of: rather too much is
    reached than too little.

    Raises:
        Unsupported: a function on the way is not its class's or module's own.
    """
    key = frozenset(classes)
    if key not in _FOUND or not _FOUND[key][1].intact():
        found = _follow(key)
        _FOUND[key] = found, watch((), found.items, found.dicts)
    return _FOUND[key][0]


def _follow(classes: Iterable[type]) -> Reached:
    owners = {base for cls in classes for base in cls.__mro__ if _package(base) in PACKAGES}
    found, names, todo = dict[tuple[int, str], Item](), set[str](), [*_ENTRIES]
    while todo:
        name = todo.pop()
        if name in names or (name.startswith("__") and name not in _ENTRIES):
            continue
        names.add(name)
        for owner in owners:
            held = _dict_of(owner)
            if name in held:
                found[id(held), name] = (held, name, held[name])
                links = [*_links(held[name], f"{owner.__qualname__}.{name}")]
                _check_own(links, owner, name)
                for function in links:
                    todo += _scan(function, found)
    return Reached([*found.values()], [_dict_of(owner) for owner in owners], frozenset(names))


def _scan(function: FunctionType, found: dict[tuple[int, str], Item]) -> Iterator[str]:
    """The names in a function's code; the global functions that it can call go into `found`."""
    names, outside = _names(function.__code__), function.__globals__
    yield from names
    modules = [vars(v) for n in names if isinstance(v := outside.get(n), ModuleType)]
    for held in (outside, *(m for m in modules if _root(m["__name__"]) in PACKAGES)):
        for name in names & held.keys():
            value = held[name]
            if not callable(value) or isinstance(value, type) or (id(held), name) in found:
                continue
            found[id(held), name] = (held, name, value)
            links = [*_links(value, f"{held['__name__']}.{name}")]
            if held is not outside:
                require_named(value, name, held["__name__"])
            for link in links:
                if _root(link.__module__) == "diffusers":
                    yield from _scan(link, found)


def require_named(value: Any, name: str, module: str) -> None:
    """Raise Unsupported where a module has under `name` a function of another name."""
    own = getattr(value, "__name__", name)
    if own.strip("_") != name.strip("_"):
        raise Unsupported(f"{module}.{name}, which is another function now: {own}")


def _check_own(links: list[FunctionType], owner: type, name: str) -> None:
    """Raise Unsupported unless one of a function's links was written as `owner`'s `name`."""
    home, method = vars(sys.modules.get(owner.__module__, sys)), f"{owner.__qualname__}.{name}"
    alias = owner is nn.Module  # __call__ and forward are names for others of its functions
    own = (
        link.__globals__ is home and (alias or link.__code__.co_qualname == method)
        for link in links
    )
    if links and not any(own):
        written = links[-1].__code__.co_qualname
        raise Unsupported(f"{method}, which is another function now: {written}")


def _links(value: Any, where: str) -> Iterator[FunctionType]:
    """A function and those it wraps, out of whatever makes it a method or property.

    Raises Unsupported where one of them is a stranger's.
    """
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, cached_property):
        value = value.func
    value = getattr(value, "__func__", value)
    while value is not None:
        package = _package(type(value))
        if isinstance(value, FunctionType):
            package = _root(value.__globals__.get("__name__"))
            yield value
        if package not in _KNOWN or isinstance(value, partial | partialmethod):
            name = getattr(value, "__qualname__", type(value).__qualname__)
            raise Unsupported(f"{where}, which is another function now: {package}'s {name}")
        value = getattr(value, "__wrapped__", None)


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _root(module: Any) -> str:
    return str(module).partition(".")[0]


def _package(cls: type) -> str:
    return _root(cls.__module__)


def _dict_of(cls: type) -> dict[str, Any]:
    """The dict behind a class's `__dict__`, which shows it read-only and cannot be watched.

    Python adds two entries when it is first asked for them: by copies, and by who reads types.
    """
    copyreg._slotnames(cls)  # type: ignore[attr-defined]
    _ = cls.__annotations__
    (held,) = (d for d in gc.get_referents(vars(cls)) if isinstance(d, dict))
    return held
