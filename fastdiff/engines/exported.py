"""What `fastdiff export --onnx` says of the folder it wrote: schema `fastdiff.export/1`."""

import json
from pathlib import Path
from typing import Any

from fastdiff.engines import fingerprint
from fastdiff.errors import UserError

SCHEMA = "fastdiff.export/1"
FILE = "export.json"


def read(folder: Path) -> dict[str, Any]:
    """The document of an exported folder, its files not yet looked at; UserError for any other."""
    path = folder / FILE
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = document["schema"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} was not written by fastdiff export --onnx: it has no readable {FILE}"
        ) from None
    if schema != SCHEMA:
        raise UserError(f"{path} is {schema}, this fastdiff reads {SCHEMA}; export again")
    return document


def check(folder: Path) -> dict[str, Any]:
    """The document of an exported folder, every file compared with it; UserError for others."""
    document = read(folder)
    for part in document["parts"]:
        check_part(folder, part)
    return document


def check_part(folder: Path, part: dict[str, Any]) -> None:
    """UserError unless a part's file is what its row of the document says."""
    file = folder / part["file"]
    if sha256_of(file) != part["sha256"]:
        raise UserError(f"{file} is not what was written; copy it again, or export again")


def sha256_of(file: Path) -> str:
    """Of an ONNX file, and then of the weights that lie beside it."""
    return fingerprint.of_files(*sorted(file.parent.glob(f"{file.name}*")))
