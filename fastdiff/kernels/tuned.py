"""Launch configurations that were faster than the default on a GPU; `pick` looks them up.

`tables/sm_<arch>.json` is written by `python -m benchmarks.tune` on that GPU and reviewed like
code. For an op and the integer arguments of its `pick`, it holds the configuration that was faster.
For an architecture without a table, each `gpu.py` decides alone. Nothing is tuned at a first call:
the same call starts the same kernel on every machine of an architecture.
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
"""Fields that say where a table comes from."""
ROW = ("op", "key", "config", "rule", "measured")
MEASURED = ("case", "dtype", "samples_ms", "rule_samples_ms", "ratio")
"""Fields for each case with a row's key: interleaved samples of both, and their ratio."""

Table = dict[tuple[str, str], dict[str, int]]
"""Configurations by op and key."""


@dataclass(frozen=True)
class Pick:
    """One call of a `pick` and its result."""

    op: str
    arguments: Mapping[str, int]
    config: Any


_forced: ContextVar[Mapping[str, Any]] = ContextVar("forced", default=MappingProxyType({}))
_picks: ContextVar[list[Pick] | None] = ContextVar("picks", default=None)


def tunable(op: str) -> Callable[[Callable[P, C]], Callable[P, C]]:
    """Let an architecture's table override a `pick(ints..., arch) -> LaunchConfig`.

    The key is all arguments but arch, by name. Raises TypeError for a `pick` without `arch`. A call
    raises ValueError if the table is damaged, or if a row's fields differ from those of the default
    configuration.
    """

    def decorate(pick: Callable[P, C]) -> Callable[P, C]:
        names = list(signature(pick).parameters)
        if "arch" not in names:
            raise TypeError(f"{op}: pick({', '.join(names)}) takes no arch")

        @wraps(pick)
        def picked(*args: P.args, **kwargs: P.kwargs) -> C:
            config = pick(*args, **kwargs)  # also to refuse invalid arguments
            named: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
            arguments = {name: int(value) for name, value in named.items()}  # a flag becomes 0 or 1
            if op in (forced := _forced.get()):
                config = config if forced[op] is None else forced[op]
            elif rows := table(arguments["arch"]):
                row = rows.get((op, key(arguments)))
                config = config if row is None else _config_from(config, row, op, arguments)
            if (picks := _picks.get()) is not None:
                picks.append(Pick(op, arguments, config))
            return config

        return picked

    return decorate


def key(arguments: Mapping[str, int]) -> str:
    """The key in a table, with names in order: "K=64,Lk=4096,size=2"."""
    return ",".join(f"{name}={arguments[name]}" for name in sorted(arguments) if name != "arch")


@contextmanager
def forced(op: str, config: Any) -> Iterator[None]:
    """In this block an op's `pick` returns `config`, whatever its arguments; None: the default."""
    token = _forced.set({**_forced.get(), op: config})
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def recorded() -> Iterator[list[Pick]]:
    """Collect the picks of all tunable ops in the block, in order."""
    picks: list[Pick] = []
    token = _picks.set(picks)
    try:
        yield picks
    finally:
        _picks.reset(token)


@cache
def table(arch: int) -> Table:
    """The committed rows for an architecture; none if no GPU of it has been measured."""
    path = _path(arch)
    return read(path, arch) if path.exists() else {}


def _path(arch: int) -> Path:
    return FOLDER / f"sm_{arch}.json"


def read(path: Path, arch: int) -> Table:
    """Read a file of schema `fastdiff.tuned/1`; ValueError, in a sentence, if it is not valid."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return _rows(document, arch)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {what}; tune again or remove it") from error


def _rows(document: dict[str, Any], arch: int) -> Table:
    if document["schema"] != SCHEMA:
        raise ValueError(f"it has schema {document['schema']!r}, not {SCHEMA}")
    if document.get("dry_run"):
        raise ValueError("it is from a dry run, which measured the interpreter")
    if document["arch"] != arch:
        raise ValueError(f"it is for sm_{document['arch']}, not for sm_{arch}")
    _named(document, ABOUT)
    rows: Table = {}
    for row in document["rows"]:
        _named(row, ROW)
        at = (str(row["op"]), key(_integers(row["key"])))
        for case in row["measured"]:
            _named(case, MEASURED)
            if not case["ratio"]["lo"] > 1:
                raise ValueError(
                    f"{at[0]} ({at[1]}) is not faster than the default on {case['case']}"
                )
        if not row["measured"] or at in rows:
            raise ValueError(f"{at[0]} ({at[1]}) occurs twice or was never measured")
        rows[at] = _integers(row["config"])
    return rows


def _named(mapping: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        mapping[name]


def _integers(mapping: Mapping[str, Any]) -> dict[str, int]:
    if wrong := {name: value for name, value in mapping.items() if type(value) is not int}:
        raise ValueError(f"{wrong} should be integers")
    return dict(mapping)


def _config_from(rule: Any, row: Mapping[str, int], op: str, arguments: Mapping[str, int]) -> Any:
    """A configuration of the default's class, from a row of the table."""
    names = {field.name for field in fields(rule)}
    if other := sorted(names ^ set(row)):
        raise ValueError(
            f"{_path(arguments['arch'])}: {op} ({key(arguments)}) differs from"
            f" {type(rule).__name__} in {', '.join(other)}; tune again or remove it"
        )
    return type(rule)(**row)
