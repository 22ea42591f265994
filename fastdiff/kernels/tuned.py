"""Launch configurations that a GPU measured to be faster than the rule's own, looked up by `pick`.

`tables/sm_<arch>.json`, written by `python -m benchmarks.tune` on that GPU and reviewed like code,
holds for an op and the integers that its `pick` was asked with the configuration that was faster.
There is none before a GPU has measured, and then the rule of each `gpu.py` decides alone. Nothing
is tuned at a first call: the same call starts the same kernel on every machine of an architecture.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import cache, wraps
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
C = TypeVar("C")

SCHEMA = "fastdiff.tuned/1"
FOLDER = Path(__file__).with_name("tables")
ABOUT = ("machine", "versions", "commit", "command")
"""Where a table comes from."""
ROW = ("op", "key", "config", "rule", "measured")
MEASURED = ("case", "dtype", "samples_ms", "rule_samples_ms", "ratio")
"""Of each case that picks by a row's key: samples of both in turn, and how many times as fast."""

Table = dict[tuple[str, str], dict[str, int]]
"""Configurations by op and key."""


@dataclass(frozen=True)
class Pick:
    """One call of a `pick` and what came of it."""

    op: str
    arguments: Mapping[str, int]
    config: Any


_forced: ContextVar[Mapping[str, Any]] = ContextVar("forced", default=MappingProxyType({}))
_picks: ContextVar[list[Pick] | None] = ContextVar("picks", default=None)


def tunable(op: str) -> Callable[[Callable[P, C]], Callable[P, C]]:
    """Let the table of the call's architecture overrule a `pick(ints..., arch) -> LaunchConfig`.

    The key is all arguments but arch, by name. Raises TypeError for a `pick` that takes no `arch`,
    and, when it is called, ValueError where the table is damaged or a row has other fields than the
    rule's configuration.
    """

    def decorate(pick: Callable[P, C]) -> Callable[P, C]:
        names = list(signature(pick).parameters)
        if "arch" not in names:
            raise TypeError(f"{op}: pick({', '.join(names)}) takes no arch")

        @wraps(pick)
        def picked(*args: P.args, **kwargs: P.kwargs) -> C:
            config = pick(*args, **kwargs)  # also where it refuses the arguments
            named: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
            arguments = {name: int(value) for name, value in named.items()}  # a flag is 0 or 1
            if op in (forced := _forced.get()):
                config = config if forced[op] is None else forced[op]
            elif rows := table(arguments["arch"]):
                row = rows.get((op, key(arguments)))
                config = config if row is None else _like(config, row, op, arguments)
            if (picks := _picks.get()) is not None:
                picks.append(Pick(op, arguments, config))
            return config

        return picked

    return decorate


def key(arguments: Mapping[str, int]) -> str:
    """What a table is looked up by, in the order of the names: "K=64,Lk=4096,size=2"."""
    return ",".join(f"{name}={arguments[name]}" for name in sorted(arguments) if name != "arch")


@contextmanager
def forced(op: str, config: Any) -> Iterator[None]:
    """Within it an op's `pick` answers `config`, whatever it is asked; None: what its rule says."""
    token = _forced.set({**_forced.get(), op: config})
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def recorded() -> Iterator[list[Pick]]:
    """The picks of all tunable ops within it, in order."""
    picks: list[Pick] = []
    token = _picks.set(picks)
    try:
        yield picks
    finally:
        _picks.reset(token)


@cache
def table(arch: int) -> Table:
    """The committed rows of an architecture; none where no GPU of it has measured."""
    path = _path(arch)
    return read(path, arch) if path.exists() else {}


def _path(arch: int) -> Path:
    return FOLDER / f"sm_{arch}.json"


def read(path: Path, arch: int) -> Table:
    """A file of schema `fastdiff.tuned/1`; ValueError, in a sentence, where it may not be used."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return _rows(document, arch)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {what}; tune again or remove it") from error


def _rows(document: dict[str, Any], arch: int) -> Table:
    if document["schema"] != SCHEMA:
        raise ValueError(f"it is of schema {document['schema']!r}, not {SCHEMA}")
    if document.get("dry_run"):
        raise ValueError("it is of a dry run, which measured the interpreter")
    if document["arch"] != arch:
        raise ValueError(f"it is of sm_{document['arch']}, not sm_{arch}")
    _named(document, ABOUT)
    rows: Table = {}
    for row in document["rows"]:
        _named(row, ROW)
        at = (str(row["op"]), key(_integers(row["key"])))
        for case in row["measured"]:
            _named(case, MEASURED)
            if not case["ratio"]["lo"] > 1:
                raise ValueError(f"{at[0]} ({at[1]}) is not faster than the rule on {case['case']}")
        if not row["measured"] or at in rows:
            raise ValueError(f"{at[0]} ({at[1]}) is there twice or was never measured")
        rows[at] = _integers(row["config"])
    return rows


def _named(mapping: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        mapping[name]


def _integers(mapping: Mapping[str, Any]) -> dict[str, int]:
    if wrong := {name: value for name, value in mapping.items() if type(value) is not int}:
        raise ValueError(f"{wrong} should be integers")
    return dict(mapping)


def _like(rule: Any, row: Mapping[str, int], op: str, arguments: Mapping[str, int]) -> Any:
    """A configuration of the rule's own kind from a row of the table."""
    names = {field.name for field in fields(rule)}
    if other := sorted(names ^ set(row)):
        raise ValueError(
            f"{_path(arguments['arch'])}: {op} ({key(arguments)}) differs from"
            f" {type(rule).__name__} in {', '.join(other)}; tune again or remove it"
        )
    return type(rule)(**row)
