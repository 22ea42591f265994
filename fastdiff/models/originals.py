"""Whether code is what torch and diffusers came with: neither overridden, nor patched, nor wrapped.

Compact networks and tables stand for what the functions of diffusers and torch compute. So every
function that a call can reach must be theirs: not a subclass's, not a patch of a class, of a module
or of `torch.nn.functional`. A function is known by where its code was written, which neither a
subclass nor `functools.wraps` can borrow; what it reaches is followed by name, so anything is taken
for reached that bears the name of something it uses. What was found is watched by identity.
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
"""Whose code we stand for, beside the packages of classes that a reader or a row names with their
path."""
MODULES = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "forward")
"""Where calls of modules and processors begin."""

_KNOWN = {*PACKAGES, *sys.stdlib_module_names, "numpy", "scipy", "packaging", "typing_extensions"}
"""Those, and the packages that they call for what is no part of a picture."""
_DRAWN = "randn_tensor"
"""What draws noise for us, too: whatever it calls draws for both."""
_KEPT = 64
"""How many sets of classes are remembered."""


class Reached(NamedTuple):
    """What calls of some classes can reach by name."""

    items: list[Item]
    """Every function, and every other value of a class, where it lies."""
    dicts: list[dict[str, Any]]
    """Those of the classes: a function that is added to one could hide another's."""
    names: frozenset[str]
    """Of all that code, as attributes or globals."""

    def methods(self, cls: type) -> list[str]:
        """Names of functions of `cls` that are reached, less those that every module has."""
        found = {
            name
            for base in cls.__mro__
            for name, value in vars(base).items()
            if name in self.names and isinstance(value, FunctionType)
        }
        return [name for name in found if name == "forward" or not hasattr(nn.Module, name)]


_Key = tuple[frozenset[type], tuple[str, ...], frozenset[str]]
_FOUND: dict[_Key, tuple[Reached, Any]] = {}
"""What was found before, and what watches whether it still is so."""


def reached(
    classes: Iterable[type],
    entries: tuple[str, ...] = MODULES,
    packages: Iterable[str] = (),
) -> Reached:
    """Follow the methods `entries` of objects of `classes` through their classes and modules.

    packages: whose code we stand for beside PACKAGES.

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
    """Raise Unsupported unless all that the methods `entries` of an object reach is original.

    Attributes of the object count where they hide a method, or are functions of strangers.
    """
    cls = type(instance)
    code = reached([cls], entries)
    own = vars(instance)
    for name in code.names & own.keys():
        where = f"{cls.__name__}.{name}"
        if isinstance(getattr(cls, name, None), FunctionType) and replaced(instance, name):
            raise _stranger(where)
        if callable(own[name]) and not isinstance(own[name], type):
            list(_links(own[name], where))


def original(function: Any, owner: type, name: str, packages: Iterable[str] = ()) -> bool:
    """Whether `function`, which stands in `vars(owner)`, is what `owner`'s module defines there.

    packages: as of `reached`.
    """
    return _is_method(_known_links(function, frozenset(packages)), owner, name)


def own_method(instance: Any, name: str, packages: Iterable[str] = ()) -> bool:
    """Whether `instance.name` is a method that is original, in whichever class it was found.

    packages: as of `reached`.
    """
    owner = next((base for base in type(instance).__mro__ if name in vars(base)), object)
    found = vars(owner).get(name)
    return name not in vars(instance) and original(found, owner, name, packages)


def own_helper(function: Any, name: str) -> bool:
    """Whether what a module knows as `name` is a library's function of that name."""
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
                raise _stranger(f"{owner.__qualname__}.{name}", links)
            for function in links:
                todo += _scan(function, found, packages)
    return Reached([*found.values()], [held for _, held in spaces], frozenset(names))


def _scan(
    function: FunctionType, found: dict[tuple[int, str], Item], packages: frozenset[str]
) -> Iterator[str]:
    """The names in a function's code; the global functions that it can call go into `found`."""
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
                raise _stranger(where, links)
            for link in theirs if name != _DRAWN else ():
                yield from _scan(link, found, packages)


def _links(
    value: Any, where: str, packages: frozenset[str] = frozenset()
) -> Iterator[FunctionType]:
    """A function and those it wraps, out of whatever makes it a method or property.

    Raises Unsupported where one of them is a stranger's.
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
            raise _stranger(where, [value])
        value = getattr(value, "__wrapped__", None)


def _known_links(function: Any, packages: frozenset[str] = frozenset()) -> list[FunctionType]:
    """As `_links`; none where one of them is a stranger's."""
    try:
        return [*_links(function, "", packages)]
    except Unsupported:
        return []


def _is_method(links: list[FunctionType], owner: type, name: str) -> bool:
    """Whether one of a function's links was written as `owner`'s method `name`."""
    method, home = f"{owner.__qualname__}.{name}", vars(sys.modules.get(owner.__module__, sys))
    return any(
        # Module's __call__ and forward are names for others of its functions
        link.__globals__ is home and (link.__code__.co_qualname == method or owner is nn.Module)
        for link in links
    )


def _is_helper(links: list[FunctionType], name: str) -> bool:
    """Whether one of a function's links was written as a module's function `name`."""
    return any(link.__code__.co_qualname == name for link in links)


def _stranger(where: str, links: list[Any] | None = None) -> Unsupported:
    """`where`: a function; `links`: what stands there instead."""
    now = "".join(f": {getattr(link, '__qualname__', link)}" for link in (links or [])[-1:])
    return Unsupported(f"{where} is not its library's own{now}")


@cache
def _names(code: CodeType) -> frozenset[str]:
    """Names of attributes and globals in a function, those inside it among them."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*map(_names, inner))


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
