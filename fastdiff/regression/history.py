"""Speeds over the commits, from the result files in the repository.

Only ratios to eager in the same run are used, and each machine has its own folder and series:
nothing absolute is compared across machines.
"""

import json
import math
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from fastdiff.errors import UserError

# bench.results has it, but importing that takes torch and three seconds
SCHEMA = "fastdiff.bench/1"
BASELINE = "eager"


@dataclass(frozen=True)
class Point:
    """One backend's speed at one commit; more is better."""

    machine: str
    """The folder's name."""
    name: str
    """The series: case · backend."""
    commit: str | None
    created: str
    """UTC, ISO 8601: the time of measurement, or else of its commit."""
    value: float
    """How many times as fast as eager in the same run."""
    lo: float
    hi: float


def read(folder: Path) -> list[Point]:
    """All points in `folder`/MACHINE/*.json, oldest first; files of other schemas are ignored.

    UserError if `folder` is not a folder, or a file is not JSON or does not match its schema.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that holds MACHINE/*.json")
    points = [point for path in sorted(folder.glob("*/*.json")) for point in _points(path)]
    return sorted(points, key=lambda point: (point.created, point.machine, point.name))


def _points(path: Path) -> list[Point]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); remove or repair it") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        return []
    if document.get("incomplete"):
        return []
    try:
        commit = document.get("commit")
        created = _utc(document.get("created")) or _date(path.parent, commit) or _modified(path)
        return [
            Point(
                machine=path.parent.name,
                name=f"{row['case']} · {row['backend']}",
                commit=None if commit is None else str(commit),
                created=created,
                **_ratio(row["ratio_vs_eager"]),
            )
            for row in document["rows"]
            if row["backend"] != BASELINE and row.get("ratio_vs_eager")
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} says it is {SCHEMA}, but {type(error).__name__}: {error}; write it again"
        ) from error


def _ratio(ratio: dict[str, Any]) -> dict[str, float]:
    found = {"value": float(ratio["median"]), "lo": float(ratio["lo"]), "hi": float(ratio["hi"])}
    if lost := [name for name, value in found.items() if not 0 < value < math.inf]:
        raise ValueError(f"its ratio is {found[lost[0]]}")
    return found


@cache
def _date(folder: Path, commit: object) -> str | None:
    """The time of a commit; None if git does not know it."""
    name = str(commit).removesuffix("-dirty")
    if not re.fullmatch("[0-9a-f]{4,40}", name):  # any other word could be an option of git
        return None
    command = ["git", "-C", str(folder), "show", "-s", "--format=%cI", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return _utc(done.stdout.strip())


def _modified(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()


def _utc(text: object) -> str | None:
    """Converted to UTC, so that the texts sort by time."""
    try:
        return datetime.fromisoformat(str(text)).astimezone(UTC).isoformat()
    except ValueError:
        return None
