"""The table of edits that users make to a pipeline, by kind and name."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edits.twins import Twin

KINDS = (
    *("attribute", "submodule", "class", "function", "hook", "adapter"),
    *("dtype", "scheduler", "processor", "callback", "saver", "restore"),
)


@dataclass(frozen=True)
class Edit:
    """One edit that users make, applied in the same way to both twins."""

    kind: str
    name: str
    apply: Callable[[Twin], None] | None = None
    """Changes one twin."""
    everywhere: Callable[[random.Random], AbstractContextManager[Any]] | None = None
    """A context that changes what all pipelines share; entered before `apply`."""

    @property
    def id(self) -> str:
        return f"{self.kind}: {self.name}"


TABLE: dict[str, Edit] = {}


def add(edit: Edit) -> None:
    assert edit.kind in KINDS, edit
    assert edit.id not in TABLE, edit
    TABLE[edit.id] = edit


def edit(kind: str, name: str) -> Callable[[Callable[[Twin], None]], Callable[[Twin], None]]:
    """A decorator that adds a function of one twin to the table."""

    def put(apply: Callable[[Twin], None]) -> Callable[[Twin], None]:
        add(Edit(kind, name, apply))
        return apply

    return put


def edits(kind: str, rows: dict[str, Callable[[Any], Any]]) -> None:
    """Add functions of a pipeline to the table, by name."""
    for name, change in rows.items():
        add(Edit(kind, name, lambda twin, change=change: change(twin.pipe)))


def altered(result: Any) -> Any:
    """A module's result with its first tensor changed so that no later norm undoes the change."""
    if isinstance(result, Tensor) and result.is_floating_point() and result.ndim:
        return result * 0.9 + result.roll(1, -1) * 0.1
    if isinstance(result, tuple) and not hasattr(result, "_fields"):
        return (altered(result[0]), *result[1:])
    if hasattr(result, "sample") and isinstance(result.sample, Tensor):
        return type(result)(sample=altered(result.sample))
    return result
