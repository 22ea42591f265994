"""Chooses the implementation of an op on a CPU: one of our own kernels, or torch's library.

`tables/cpu_<isa>.json` is written by `python -m benchmarks.tune --cpu` and reviewed like code. For
each size in the models it has the times of all implementations and the name of the fastest. Another
size uses the choice of the nearest size in the table: the one with the least sum of |log2| of the
sizes' ratios. An instruction set without a table uses the measured one's choices, except
the library.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.contract import KernelSpec

SCHEMA = "fastdiff.cpu/1"
FOLDER = Path(__file__).with_name("tables")
OWN, LIBRARY = "own", "library"
"""The only kernel of an op that has no other; torch's own op, on the tensors as we store them."""
MEASURED = "avx512bf16"
"""The instruction set whose table is used for those that have none."""
ABOUT = ("isa", "machine", "versions", "commit", "command")
"""Fields that say where a table comes from."""


@dataclass(frozen=True, slots=True)
class Work:
    """The properties of a call that decide which implementation is fastest."""

    op: str
    dtype: str
    kind: str
    """What must be equal for two calls to be compared: windows, activations, absent arguments."""
    sizes: tuple[int, ...]
    """What may differ."""


@dataclass(frozen=True, slots=True)
class Row:
    """A measured size."""

    work: Work
    runs: str
    """The fastest: `OWN`, `LIBRARY`, or one of the op's algorithms."""
    ms: Mapping[str, float]
    """The median time of each implementation. A name that begins with "eager" is torch's op on
    tensors laid out as in diffusers' own modules."""


def work_of(spec: KernelSpec, a: Any) -> Work:
    """The work of a call of the op with the arguments `a`."""
    first = _first(a)
    dtype = str(first.dtype).removeprefix("torch.")
    if spec.work is not None:
        return Work(spec.name, dtype, *spec.work(a))
    told = [_told(name, getattr(a, name)) for name in a.__slots__]
    return Work(spec.name, dtype, " ".join(filter(None, told)), tuple(first.shape))


def _told(name: str, value: Any) -> str:
    """An argument in a work's kind: its name if it is there, or its value if that is a word."""
    if isinstance(value, str):
        return "" if value == "none" else value
    return name if isinstance(value, Tensor) or value is True else ""


def runs(spec: KernelSpec, a: Any, isa: str) -> str:
    """The implementation of a call on a processor with instruction set `isa`."""
    if spec.work is not None and _first(a).dtype == torch.bfloat16 and has_amx():
        return LIBRARY  # its AMX tiles are many times as fast as any vector code
    if spec.name not in _decided(isa):
        return OWN
    return _chosen(work_of(spec, a), isa)


def _first(a: Any) -> Tensor:
    first: Tensor = getattr(a, a.__slots__[0])
    return first


@cache
def _decided(isa: str) -> frozenset[str]:
    """The ops that have an implementation other than OWN for some size."""
    rows = (row for rows in table(isa).values() for row in rows)
    return frozenset(row.work.op for row in rows if row.runs != OWN)


@cache
def has_amx() -> bool:
    """Whether this processor multiplies bfloat16 with AMX tiles."""
    return torch.cpu._is_amx_tile_supported()


@lru_cache(maxsize=4096)
def _chosen(work: Work, isa: str) -> str:
    alike = table(isa).get((work.op, work.dtype, work.kind, len(work.sizes)))
    return min(alike, key=lambda row: _distance(row.work, work)).runs if alike else OWN


def _distance(one: Work, other: Work) -> float:
    pairs = zip(one.sizes, other.sizes, strict=True)
    return sum(abs(log2(a / max(b, 1))) for a, b in pairs if a != b)


@cache
def table(isa: str) -> Mapping[tuple[str, str, str, int], tuple[Row, ...]]:
    """The rows for an instruction set by op, dtype, kind and number of sizes; {} without tables."""
    own, other = FOLDER / f"cpu_{isa}.json", FOLDER / f"cpu_{MEASURED}.json"
    rows: Iterable[Row] = ()
    if own.exists():
        rows = read(own, isa)
    elif other.exists():
        rows = _in_float32(read(other, MEASURED))
    alike: defaultdict[tuple[str, str, str, int], list[Row]] = defaultdict(list)
    for row in rows:
        work = row.work
        alike[work.op, work.dtype, work.kind, len(work.sizes)].append(row)
    return {key: tuple(rows) for key, rows in alike.items()}


def _in_float32(rows: list[Row]) -> Iterator[Row]:
    """The rows of `MEASURED`, for an instruction set that computes bfloat16 in float32: the choices
    among our own kernels. The library's speed there is unknown."""
    for row in rows:
        own = {name: ms for name, ms in row.ms.items() if not theirs(name)}
        if row.work.dtype == "float32" and own:
            for dtype in ("float32", "bfloat16"):
                work = replace(row.work, dtype=dtype)
                yield Row(work, min(own, key=own.__getitem__), own)


def theirs(name: str) -> bool:
    """Whether an implementation's name in a row means torch."""
    return name == LIBRARY or name.startswith("eager")


def read(path: Path, isa: str) -> list[Row]:
    """Read a file of schema `fastdiff.cpu/1`; ValueError, in one sentence, if it cannot be used."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"it has schema {document['schema']!r}, not {SCHEMA}")
        for name in ABOUT:
            document[name]
        if document["isa"] != isa:
            raise ValueError(f"it is for {document['isa']}, not for {isa}")
        rows = [_row(row) for row in document["rows"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {what}; measure again or remove it") from error
    return rows


def _row(row: Mapping[str, Any]) -> Row:
    sizes = tuple(row["sizes"])
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"sizes {sizes} should be positive integers")
    work = Work(row["op"], row["dtype"], row["kind"], sizes)
    ms = {str(name): float(value) for name, value in row["ms"].items()}
    if row["runs"] not in ms or row["runs"].startswith("eager"):
        raise ValueError(f"{work} runs as {row['runs']!r}, which was not measured")
    return Row(work, row["runs"], ms)
