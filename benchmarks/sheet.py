"""The JSON file of one part: saved after each row, and marked incomplete until the end."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdiff.bench.machine import commit, machine, versions
from fastdiff.jsonable import finite
from fastdiff.written import write_text


class Sheet:
    def __init__(self, path: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path = path
        self._facts = {"machine": machine(), "versions": versions(), "commit": commit()}

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._write(incomplete=True)

    def _write(self, incomplete: bool) -> None:
        document = finite(self._facts | {"incomplete": incomplete, "rows": self.rows})
        write_text(self._path, json.dumps(document, indent=1, allow_nan=False) + "\n")

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator["Sheet"]:
        """A sheet that is marked incomplete until the block succeeds."""
        sheet = cls(path)
        sheet._write(incomplete=True)
        yield sheet
        sheet._write(incomplete=False)
