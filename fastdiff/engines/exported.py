"""Reads the export.json of `fastdiff export --onnx`: schema `fastdiff.export/1`."""

import json
from pathlib import Path
from typing import Any

from fastdiff.engines import fingerprint
from fastdiff.errors import UserError

SCHEMA = "fastdiff.export/1"
FILE = "export.json"

_ROW: dict[str, type] = dict.fromkeys(("file", "dtype", "sha256", "network_sha256"), str)
_ROW |= {"inputs": dict, "outputs": dict}
"""The fields that are read of each part, with their types."""


def read(folder: Path) -> dict[str, Any]:
    """The document of an exported folder, without checking files; UserError for others."""
    path = folder / FILE
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = document["schema"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} was not written by fastdiff export --onnx: it has no readable {FILE}"
        ) from None
    if schema != SCHEMA:
        raise UserError(
            f"{path} has schema {schema}, but this fastdiff reads {SCHEMA}; export again"
        )
    parts = document.get("parts")
    if not isinstance(parts, list) or not all(map(_is_part, parts)):
        raise UserError(f"{path} is damaged: it does not name its parts; export again")
    return document


def check(folder: Path) -> dict[str, Any]:
    """The document of an exported folder, with every file checked; UserError if one differs."""
    document = read(folder)
    for part in document["parts"]:
        check_part(folder, part)
    return document


def part(folder: Path, name: str) -> dict[str, Any]:
    """The row of a part, with its file checked; UserError if the folder does not have it."""
    for row in read(folder)["parts"]:
        if row["file"].split("/")[0] == name:
            check_part(folder, row)
            found: dict[str, Any] = row
            return found
    raise UserError(f"{folder} holds no {name}; fastdiff export --onnx writes one")


def check_part(folder: Path, part: dict[str, Any]) -> None:
    """UserError unless a part's file matches its row of the document."""
    file = folder / part["file"]
    try:
        same = sha256_of(file) == part["sha256"]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    if not same:
        raise UserError(f"{file} differs from what was written; copy it again, or export again")


def _is_part(row: object) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(k), t) for k, t in _ROW.items())


def files_of(file: Path) -> list[Path]:
    """An ONNX file, and its weights' file if there is one."""
    data = file.with_name(f"{file.name}_data")
    return [file, data] if data.exists() else [file]


def sha256_of(file: Path) -> str:
    """The SHA-256 of its `files_of`, one after another."""
    return fingerprint.of_files(*files_of(file))
