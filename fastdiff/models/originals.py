"""Whether code is torch's and diffusers' own: not overridden, patched or wrapped.

Compact networks and tables replace functions of diffusers and torch. So every function that a call
can reach must be theirs, not a subclass's and not a patch of a class, of a module or of
`torch.nn.functional`. A function is identified by where its code was written, which neither a
subclass nor `functools.wraps` can imitate. Reachable functions are found by name: everything with a
name that the code uses counts as reached. What is found is then watched by identity.
"""

import copyreg
import gc
import sys
from collections.abc import Iterable, Iterator
from functools import cache, cached_property, partial, partialmethod
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from fastdiff.models.watch import Item, Unsupported, replaced, watch

PACKAGES = ("torch", "diffusers", "peft")
"""Packages whose code fastdiff replaces, besides those of classes that are named by their path."""
MODULES = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "forward")
"""The methods with which calls of modules and processors begin."""

_KNOWN = {*PACKAGES, *sys.stdlib_module_names, "numpy", "scipy", "packaging", "typing_extensions"}
"""These packages, and those that they call for work other than drawing the picture."""
_DRAWN = "randn_tensor"
"""Draws noise for fastdiff, too, so the functions that it calls need no check."""
_KEPT = 64
"""How many sets of classes are remembered."""


class Reached(NamedTuple):
    """What calls of some classes can reach by name."""

    items: list[Item]
    """Every reached function and other class value, with the dict that holds it."""
    dicts: list[dict[str, Any]]
    """The classes' dicts: a function added to one could hide another class's."""
    names: frozenset[str]
    """All names that this code uses as attributes or globals."""

    def methods(self, cls: type) -> list[str]:
        """The names of the reached functions of `cls`, without those that every module has."""
        found = {
            name
            for base in cls.__mro__
            for name, value in vars(base).items()
            if name in self.names and isinstance(value, FunctionType)
        }
        return [name for name in found if name == "forward" or not hasattr(nn.Module, name)]


_Key = tuple[frozenset[type], tuple[str, ...], frozenset[str]]
_FOUND: dict[_Key, tuple[Reached, Any]] = {}
"""Earlier results, each with a watch that says whether it is still valid."""


def reached(
    classes: Iterable[type],
    entries: tuple[str, ...] = MODULES,
    packages: Iterable[str] = (),
) -> Reached:
    """Follow the methods `entries` of objects of `classes` through their classes and modules.

    packages: whose code counts as original, besides PACKAGES.

    Raises:
        Unsupported: a function on the way is not its class's or module's own.
    """
    key = frozenset(classes), entries, frozenset(packages)
    if key not in _FOUND or not _FOUND[key][1].intact():
        found = _follow(*key)
        while len(_FOUND) >= _KEPT:
            _FOUND.pop(next(iter(_FOUND)), None)
        _FOUND[key] = found, watch((), found.items, found.dicts)
    return _FOUND[key][0]


def check_own(instance: Any, entries: tuple[str, ...]) -> None:
    """Raise Unsupported unless everything that an object's methods `entries` reach is original.

    An attribute of the object counts if it hides a method, or is a foreign function.
    """
    cls = type(instance)
    code = reached([cls], entries)
    own = vars(instance)
    for name in code.names & own.keys():
        where = f"{cls.__name__}.{name}"
        if isinstance(getattr(cls, name, None), FunctionType) and replaced(instance, name):
            raise _foreign(where)
        if callable(own[name]) and not isinstance(own[name], type):
            list(_links(own[name], where))


def original(function: Any, owner: type, name: str, packages: Iterable[str] = ()) -> bool:
    """Whether `function`, found in `vars(owner)`, is what `owner`'s module defines there.

    packages: as for `reached`.
    """
    return _is_method(_known_links(function, frozenset(packages)), owner, name)


def own_method(instance: Any, name: str, packages: Iterable[str] = ()) -> bool:
    """Whether the method `instance.name` is original, in whichever class it is found.

    packages: as for `reached`.
    """
    owner = next((base for base in type(instance).__mro__ if name in vars(base)), object)
    found = vars(owner).get(name)
    return name not in vars(instance) and original(found, owner, name, packages)


def own_helper(function: Any, name: str) -> bool:
    """Whether `function`, which a module holds as `name`, is a library's function of that name."""
    return _is_helper(_known_links(function), name)


def _follow(classes: Iterable[type], entries: tuple[str, ...], packages: frozenset[str]) -> Reached:
    bases = {base for cls in classes for base in cls.__mro__}
    owners = [base for base in bases if _package(base) not in sys.stdlib_module_names]
    spaces = [(owner, _dict_of(owner)) for owner in owners]
    found, names, todo = dict[tuple[int, str], Item](), set[str](), [*entries]
    while todo:
        name = todo.pop()
        if name in names or (name.startswith("__") and name not in entries):
            continue
        names.add(name)
        for owner, held in spaces:
            if name not in held:
                continue
            found[id(held), name] = (held, name, held[name])
            links = [*_links(held[name], f"{owner.__qualname__}.{name}", packages)]
            theirs = _package(owner) in packages.union(PACKAGES)
            if not theirs or (links and not _is_method(links, owner, name)):
                raise _foreign(f"{owner.__qualname__}.{name}", links)
            for function in links:
                todo += _scan(function, found, packages)
    return Reached([*found.values()], [held for _, held in spaces], frozenset(names))


def _scan(
    function: FunctionType, found: dict[tuple[int, str], Item], packages: frozenset[str]
) -> Iterator[str]:
    """The names in a function's code; the global functions that it can call are added to
    `found`."""
    names, outside = _names(function.__code__), function.__globals__
    yield from names
    modules = [vars(v) for n in names if isinstance(v := outside.get(n), ModuleType)]
    whole = packages.union(PACKAGES)
    for held in (outside, *(m for m in modules if _root(m["__name__"]) in whole)):
        for name in names & held.keys():
            value, where = held[name], f"{held['__name__']}.{name}"
            if not callable(value) or isinstance(value, type) or (id(held), name) in found:
                continue
            found[id(held), name] = (held, name, value)
            links = [*_links(value, where, packages)]
            followed = packages | {"diffusers"}
            theirs = [link for link in links if _root(link.__module__) in followed]
            called = getattr(value, "__name__", name) if held is not outside else name
            if called.strip("_") != name.strip("_") or (theirs and not _is_helper(links, name)):
                raise _foreign(where, links)
            for link in theirs if name != _DRAWN else ():
                yield from _scan(link, found, packages)


def _links(
    value: Any, where: str, packages: frozenset[str] = frozenset()
) -> Iterator[FunctionType]:
    """A function and those it wraps, taken out of any method or property object.

    Raises Unsupported if one of them is foreign.
    """
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, cached_property):
        value = value.func
    value = getattr(value, "__func__", value)
    while callable(value) and not isinstance(value, type):
        package = _package(type(value))
        if isinstance(value, FunctionType):
            package = _root(value.__globals__.get("__name__"))
            yield value
        if package not in packages.union(_KNOWN) or isinstance(value, partial | partialmethod):
            raise _foreign(where, [value])
        value = getattr(value, "__wrapped__", None)


def _known_links(function: Any, packages: frozenset[str] = frozenset()) -> list[FunctionType]:
    """As `_links`; empty if one of them is foreign."""
    try:
        return [*_links(function, "", packages)]
    except Unsupported:
        return []


def _is_method(links: list[FunctionType], owner: type, name: str) -> bool:
    """Whether one of a function's links was written as `owner`'s method `name`."""
    method, home = f"{owner.__qualname__}.{name}", vars(sys.modules.get(owner.__module__, sys))
    return any(
        # Module's __call__ and forward are aliases of its other functions
        link.__globals__ is home and (link.__code__.co_qualname == method or owner is nn.Module)
        for link in links
    )


def _is_helper(links: list[FunctionType], name: str) -> bool:
    """Whether one of a function's links was written as a module's function `name`."""
    return any(link.__code__.co_qualname == name for link in links)


def _foreign(where: str, links: list[Any] | None = None) -> Unsupported:
    """`where`: the function's name; `links`: what was found in its place."""
    now = "".join(f": {getattr(link, '__qualname__', link)}" for link in (links or [])[-1:])
    return Unsupported(f"{where} is not its library's own{now}")


@cache
def _names(code: CodeType) -> frozenset[str]:
    """The names of attributes and globals in a function, including the functions inside it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*map(_names, inner))


def _root(module: Any) -> str:
    return str(module).partition(".")[0]


def _package(cls: type) -> str:
    return _root(cls.__module__)


def _dict_of(cls: type) -> dict[str, Any]:
    """The dict behind a class's `__dict__`, which is a read-only view and cannot be watched.

    Python adds two entries on first use, when objects are copied and when annotations are read; so
    both are triggered here.
    """
    copyreg._slotnames(cls)  # type: ignore[attr-defined]
    _ = cls.__annotations__
    (held,) = (d for d in gc.get_referents(vars(cls)) if isinstance(d, dict))
    return held
