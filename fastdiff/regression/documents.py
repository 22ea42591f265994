"""Reads files that can be compared into `Side`s; refuses any other with one sentence.

`fastdiff.paired/1` (fastdiff compare) holds both states; `fastdiff.bench/1`, `fastdiff.counts/1`,
`fastdiff.static/1` and pytest-benchmark's JSON hold one each.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastdiff.bench.gates import Number, numbers
from fastdiff.errors import UserError
from fastdiff.regression.comparison import State

T = TypeVar("T")
PAIRED = "fastdiff.paired/1"
Times = tuple[tuple[float, ...], ...]
"""Milliseconds: [process][round]."""


class Timed(NamedTuple):
    """The samples of one row, and those of the yardstick that took turns with it, if any."""

    times: Times
    yardstick: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Side:
    """The measurements of one state."""

    state: State
    case: str = ""
    """What was measured, which is not repeated in row names."""
    times: dict[str, Timed] = field(default_factory=dict)
    counts: dict[str, Number] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    """Rows with wrong results, and how they are wrong; they have no times."""
    drawn: bool | None = None
    """Whether counting drew pictures; None if that is not an option."""


@dataclass(frozen=True)
class Pair:
    base: Side
    new: Side
    taken_in_turn: bool


def read_pair(base: Path, new: Path | None) -> Pair:
    """Read two files of one state each, or one file of both."""
    document = load(base)
    if document.get("schema") == PAIRED:
        if new is not None:
            raise UserError(f"{base} holds both states; give no second file")
        return checked(base, lambda: pair_of(document))
    before = read(base)
    if new is None:
        raise UserError(f"{base} holds one state; give a second file to compare it with")
    return Pair(before, read(new), taken_in_turn=False)


def read(path: Path) -> Side:
    """The single state in a file."""
    document = load(path)
    schema = document.get("schema")
    if schema == PAIRED:
        raise UserError(f"{path} holds both states; give no second file")
    foreign = "benchmarks" in document and "machine_info" in document
    reader = _pytest_benchmark if foreign else _READERS.get(str(schema))
    if document.get("incomplete"):
        raise UserError(f"{path} is incomplete: its run is still going or was ended; measure again")
    if reader is not None:
        return checked(path, lambda: reader(path.name, document))
    names = ", ".join([PAIRED, *_READERS])
    raise UserError(
        f"{path} is {f'of schema {schema!r}' if schema else 'JSON of another kind'}; expected one"
        f" of {names}, or what pytest-benchmark writes"
    )


def load(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        what = "is empty" if path.stat().st_size == 0 else f"is not JSON ({error})"
        raise UserError(f"{path} {what}; measure again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def checked(path: Path, build: Callable[[], T]) -> T:
    """Build from a document; if parts are missing or of a wrong type, raise one sentence."""
    try:
        return build()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged ({what}); measure again") from error


def pair_of(document: dict[str, Any]) -> Pair:
    """Both states in a `fastdiff.paired/1` document."""
    states, sides = document["states"], []
    for row in document["times"]:
        before, after = ([len(process) for process in row[side]] for side in ("base", "new"))
        if before != after or not before:
            raise UserError(f"{row['name']} has {before} rounds of BASE and {after} of NEW")
    for side in ("base", "new"):
        state = State(
            name=str(states[side]["name"]),
            commit=states[side]["commit"],
            created=document["created"],
            machine=dict(document["machine"]),
            versions=dict(states[side]["versions"]),
        )
        times = {
            str(row["name"]): Timed(_times(row["name"], row[side])) for row in document["times"]
        }
        counts = {
            name: (number(name, value), str(unit))
            for name, (value, unit) in document["counts"][side].items()
        }
        for name in document["rows"][side]:  # rows that only this state can run
            times.setdefault(name, Timed(()))
        wrong = {name: str(why) for name, why in document["wrong"][side].items()}
        sides.append(Side(state, str(document["case"]), times, counts, wrong))
    base, new = sides
    return Pair(base, new, taken_in_turn=True)


def _bench(name: str, document: dict[str, Any]) -> Side:
    """Every backend relative to eager in the same run, which cancels the machine's speed."""
    times, counts, wrong = {}, {}, {}
    rows = document["rows"]
    eager = next((row for row in rows if row["backend"] == "eager"), None)
    if eager is None:
        raise UserError("it has no row of eager to compare with; measure again")
    for row in rows:
        title = row["backend"]
        if row["receipt"] and not row["receipt"]["passed"]:
            wrong[title] = "it failed its receipt"
        if row["backend"] == "eager" or not row["samples_ms"]:
            continue
        for part, key in (("step", "samples_ms"), ("image", "image_samples_ms")):
            row_name = f"{title} · {part} against eager"
            yardstick = _times(title, [eager[key]])[0]
            times[row_name] = Timed(_times(title, [row[key]]), yardstick)
            if len(yardstick) != len(row[key]):
                raise UserError(f"{title} has {len(row[key])} rounds, eager {len(yardstick)}")
        if row["peak_mem_bytes"] is not None:
            counts[f"{title} · peak memory"] = (number(title, row["peak_mem_bytes"]), "peak bytes")
    return Side(_state(name, document), eager["case"], times, counts, wrong)


def _counts(name: str, document: dict[str, Any]) -> Side:
    counts = {
        f"{row['backend']} · {title}": (number(title, value), unit)
        for row in document["rows"]
        if row["backend"] != "eager"  # eager is diffusers' and torch's work, not ours
        for title, (value, unit) in numbers(row).items()
    }
    drawn = any(row.get("drawn") for row in document["rows"])
    return Side(_state(name, document), document["case"], counts=counts, drawn=drawn)


_STATIC = ("registers", "spills", "shared", "occupancy", "load", "store", "narrow")
_MMA = ("", "mma.sync", "wgmma", "tcgen05.mma")


def _static(name: str, document: dict[str, Any]) -> Side:
    counts: dict[str, Number] = {}
    for row in document["rows"]:
        keys = (row["op"], row["kernel"], row["case"], row["dtype"], f"sm_{row['arch']}")
        title = " · ".join(keys)
        for unit in _STATIC:
            counts[f"{title} · {unit}"] = (number(title, row[unit]), unit)
        counts[f"{title} · matrix instructions"] = (_MMA.index(row["mma"]), "generation")
    return Side(_state(name, document), "Triton kernels", counts=counts)


OF_A_CASE = ("device", "dtype", "scale", "steps")
"""Keys of our suites' extra_info that distinguish two measurements of one name."""


def _pytest_benchmark(name: str, document: dict[str, Any]) -> Side:
    """Times are in seconds; without single samples, the median is the only one."""
    machine = document["machine_info"]
    times = {}
    for row in document["benchmarks"]:
        stats = row["stats"]
        samples = stats.get("data") or [stats["median"]]
        times[row["fullname"]] = Timed(
            _times(row["fullname"], [[1e3 * number(row["name"], value) for value in samples]])
        )
    ours = machine.get("fastdiff")  # added by our own suites
    case = ""
    if ours:
        hardware, versions, commit = ours["machine"], ours["versions"], ours["commit"]
        facts = document["benchmarks"][0]["extra_info"] if document["benchmarks"] else {}
        case = ", ".join(f"{name} {facts[name]}" for name in OF_A_CASE if name in facts)
    else:
        hardware = _hardware(machine)
        versions = {"python": machine.get("python_version")}
        commit = (document.get("commit_info") or {}).get("id")
    state = State(name, commit, document.get("datetime"), dict(hardware), dict(versions))
    return Side(state, case, times)


def _hardware(machine: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of pytest-benchmark's machine_info that must not differ between two runs."""
    cpu = machine.get("cpu") or {}
    return {
        "node": machine.get("node"),
        "system": machine.get("system"),
        "cpu": cpu.get("brand_raw"),
        "cores": cpu.get("count"),
    }


def _state(name: str, document: dict[str, Any]) -> State:
    return State(
        name=name,
        commit=document.get("commit"),
        created=document.get("created"),
        machine=dict(document.get("machine") or {}),
        versions=dict(document["versions"]),
    )


def _times(name: str, processes: Any) -> Times:
    read = tuple(
        tuple(number(name, sample, least=1e-12) for sample in process) for process in processes
    )
    if not all(read):
        raise UserError(f"{name} has no samples; measure again")
    return read


def number(name: str, value: Any, least: float = -math.inf) -> float:
    """`value`, if it can be a measurement. UserError for any other."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise UserError(f"{name} has {value!r} where a number is expected; measure again")
    if not math.isfinite(value) or value < least:
        raise UserError(
            f"{name} has a sample of {value}, which cannot be a measurement; measure again"
        )
    return value


_READERS: dict[str, Callable[[str, dict[str, Any]], Side]] = {
    "fastdiff.bench/1": _bench,
    "fastdiff.counts/1": _counts,
    "fastdiff.static/1": _static,
}
