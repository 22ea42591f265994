"""Whether functions are those that diffusers (or torch) came with: neither overridden nor patched.

A function is known by where its code was written: its file and its qualified name, which neither a
subclass nor `functools.wraps` can borrow. What it reaches is followed by name, so anything is taken
for reached that bears the name of something it uses.
"""

import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

LIBRARIES = ("diffusers", "torch")
"""Packages whose functions we know."""

_ACCESS = ("__getattribute__", "__getattr__", "__setattr__", "__deepcopy__", "__reduce_ex__")
"""What runs without being named when attributes are read or written, and copies made."""


def original(function: Any, owner: type, name: str) -> bool:
    """Whether `function` is what `owner`'s own module defines as `owner.name`.

    Args:
        function: as it stands in `vars(owner)`: a function, property, static or class method.
        owner: the class in whose `__dict__` it was found.
    """
    return _written(function, owner.__module__, f"{owner.__qualname__}.{name}")


def own_method(instance: Any, name: str) -> bool:
    """Whether `instance.name` is a method that is original, in whichever class it was found."""
    owner, function = _found(type(instance), name)
    return name not in vars(instance) and owner is not None and original(function, owner, name)


def own_helper(function: Any, name: str) -> bool:
    """Whether what a module of a library knows as `name` is that library's function."""
    return _written(function, getattr(function, "__module__", None) or "", name)


def foreign(instance: Any, entries: tuple[str, ...]) -> str | None:
    """The name of what is not original among all that the methods `entries` of `instance` reach;
    None where everything is.

    Methods, properties and the helpers in their modules are followed. Attributes of the instance
    count where they hide a method, or can be called and are no library's own.
    """
    cls = type(instance)
    reached = _REACHED.get(cls)
    if reached is None or reached.entries != entries or not reached.holds():
        while len(_REACHED) >= 64:
            _REACHED.pop(next(iter(_REACHED)), None)
        reached = _REACHED[cls] = _reach(cls, entries)
    if reached.foreign is not None:
        return reached.foreign
    own: dict[str, Any] = vars(instance)
    hidden: Iterator[str] = (
        name
        for name in sorted(reached.names & own.keys())
        if name in reached.methods or (callable(own[name]) and not _ours(own[name]))
    )
    return next(hidden, None)


class _Reached(NamedTuple):
    """What the methods `entries` of a class reach."""

    entries: tuple[str, ...]
    names: frozenset[str]
    methods: frozenset[str]
    """Names that are methods or properties of the class."""
    foreign: str | None
    """The first that is not original."""
    found: tuple[tuple[Any, str, Any], ...]
    """(class or module, name, what stands there)."""
    absent: tuple[tuple[Any, frozenset[str]], ...]
    """(class or module, names that are not there)."""

    def holds(self) -> bool:
        """Whether every name still leads to what it led to."""
        for place, name, found in self.found:
            now = getattr(place, name, None)
            if now is not found and now != found:  # class methods are bound anew each time
                return False
        return all(
            names.isdisjoint(vars(space))
            for place, names in self.absent
            for space in _spaces(place)
        )


_REACHED: dict[type, _Reached] = {}


def _reach(cls: type, entries: tuple[str, ...]) -> _Reached:
    looked_up: dict[Any, set[str]] = {}  # by class and modules
    methods, foreign = set(), None

    def look(place: Any, name: str) -> bool:
        names = looked_up.setdefault(place, set())
        new = name not in names
        names.add(name)
        return new

    def follow(code: CodeType, module: ModuleType | None) -> None:
        for used in _names(code):
            method(used)
            if module is not None and look(module, used) and used in vars(module):
                helper(used, vars(module)[used])

    def method(name: str) -> None:
        nonlocal foreign
        if not look(cls, name):
            return
        owner, value = _found(cls, name)
        function = _function(value)
        if owner is None or (function is None and _library(owner.__module__)):
            return  # an attribute of instances, or data of the class
        if function is None and owner.__module__ == "builtins":
            return
        methods.add(name)
        if function is None or not original(value, owner, name):
            foreign = foreign or name
        else:
            follow(function.__code__, sys.modules.get(owner.__module__))

    def helper(name: str, value: Any) -> None:
        nonlocal foreign
        if isinstance(value, ModuleType) or not callable(value):
            return
        if isinstance(value, type):
            known = _library(value.__module__)
        else:
            known = isinstance(value, FunctionType) and own_helper(value, name)
            if known:
                follow(value.__code__, sys.modules.get(value.__module__))
        if not known:
            foreign = foreign or name

    for name in (*entries, *_ACCESS):
        method(name)
    there = {
        place: {name for name in names if any(name in vars(space) for space in _spaces(place))}
        for place, names in looked_up.items()
    }
    return _Reached(
        entries,
        frozenset(looked_up[cls]),
        frozenset(methods),
        foreign,
        tuple((place, name, getattr(place, name)) for place in there for name in there[place]),
        tuple((place, frozenset(names - there[place])) for place, names in looked_up.items()),
    )


def _spaces(place: Any) -> tuple[Any, ...]:
    """What has the attributes of a class or module in its `__dict__`."""
    return place.__mro__ if isinstance(place, type) else (place,)


def _found(cls: type, name: str) -> tuple[type | None, Any]:
    """The class in the MRO that has `name`, and what stands there."""
    for owner in cls.__mro__:
        if name in vars(owner):
            return owner, vars(owner)[name]
    return None, None


def _function(value: Any) -> FunctionType | None:
    """The Python function in a method, property, static or class method; None in all else."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, staticmethod | classmethod):
        value = value.__func__
    elif isinstance(value, cached_property):
        value = value.func
    while isinstance(value, FunctionType) and hasattr(value, "__wrapped__"):
        if not _ours(value):
            return value
        value = value.__wrapped__
    return value if isinstance(value, FunctionType) else None


def _written(value: Any, module: str, qualname: str) -> bool:
    function = _function(value)
    file = getattr(sys.modules.get(module), "__file__", None)
    return (
        function is not None
        and _library(module)
        and function.__code__.co_filename == file
        and function.__code__.co_qualname == qualname
    )


def _library(module: str) -> bool:
    return module.split(".")[0] in LIBRARIES


def _ours(value: Any) -> bool:
    """Whether it is a function written anywhere in a library."""
    if not isinstance(value, FunctionType):
        return False
    folders = (Path(sys.modules[name].__file__ or "").parent for name in LIBRARIES)
    return any(folder in Path(value.__code__.co_filename).parents for folder in folders)


def _names(code: CodeType) -> Iterator[str]:
    """Names of attributes and globals in a function, those inside it among them."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
