"""The folder of a job: pictures and a manifest, whole after a kill at any moment.

A picture is written under another name and renamed, so under its own name it is whole. The
manifest follows from the rows and the pictures: a picture without a line gets one when the job goes
on, and a line without a picture is left out. So it does not matter between which two writes a job
was killed.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fastdiff.bulk.prompts import Row
from fastdiff.errors import UserError
from fastdiff.written import check_writable, told, write_file, write_text

JOB, MANIFEST, LOCK = "job.json", "manifest.jsonl", ".lock"
UNFINISHED = ".fastdiff-*"
"""Names of files that were being written."""
KIND = "PNG"


class Job:
    """An open job. Only one process has it open."""

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        self.folder, self.rows, self._width = folder, rows, len(str(len(rows)))
        self.lines: dict[int, dict[str, Any]] = {}
        """The manifest's lines by row number."""
        self._manifest: TextIO | None = None

    @property
    def missing(self) -> list[Row]:
        """The rows that are still to be drawn; those that failed are among them."""
        return [row for row in self.rows if "file" not in self.lines.get(row.number, {})]

    @property
    def failed(self) -> int:
        """How many rows failed."""
        return sum("error" in line for line in self.lines.values())

    def picture(self, row: Row) -> Path:
        """Where the row's picture lies."""
        return self.folder / f"{row.number:0{self._width}}.{KIND.lower()}"

    def keep(self, row: Row, picture: bytes) -> None:
        """Write a row's picture, then its line."""
        write_file(self.picture(row), lambda path: _write(path, picture))
        self._add(row, self._drawn(row, picture))

    def fail(self, row: Row, error: str) -> None:
        """Write that a row could not be drawn, and why."""
        self._add(row, {"error": error})

    def _drawn(self, row: Row, picture: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(picture).hexdigest()
        return {"file": self.picture(row).name, "bytes": len(picture), "sha256": digest}

    def _add(self, row: Row, what: Mapping[str, Any]) -> None:
        self.lines[row.number] = line = {"row": row.number, **what, **row.told()}
        assert self._manifest is not None
        with told(self.folder / MANIFEST):
            self._manifest.write(_json(line) + "\n")
            self._manifest.flush()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Take over the pictures that are here; in the block, others can be kept."""
        path = self.folder / MANIFEST
        before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        lines = {line["row"]: line for line in map(_line, before.splitlines()) if line}
        for row in self.rows:
            picture, line = self.picture(row), lines.get(row.number, {})
            if not picture.exists():
                continue
            if line.get("bytes") != picture.stat().st_size:
                line = {"row": row.number, **self._drawn(row, picture.read_bytes()), **row.told()}
            self.lines[row.number] = line
        self._rewrite()
        with path.open("a", encoding="utf-8") as self._manifest:
            yield
        self._rewrite()

    def _rewrite(self) -> None:
        """Write the manifest in the order of the rows."""
        lines = (f"{_json(line)}\n" for _, line in sorted(self.lines.items()))
        write_text(self.folder / MANIFEST, "".join(lines))


@contextmanager
def opened(
    folder: Path, given: Sequence[Row], rows: Sequence[Row], asked: Mapping[str, Any]
) -> Iterator[Job]:
    """Begin a job in `folder`, or go on with it.

    Args:
        given: the rows of the file.
        rows: the same rows with all values that are drawn with.
        asked: everything else that decides what is drawn.

    Raises UserError if the folder holds something else, another job, or one that still runs.
    """
    with told(folder):
        folder.mkdir(exist_ok=True)
        lock = (folder / LOCK).open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"--out {folder}: another process is drawing into it; wait until it ends"
            ) from error
        check(folder, given, asked)
        if not (folder / JOB).exists():
            write_text(folder / JOB, json.dumps(_job(given, asked), indent=2) + "\n")
        for path in folder.glob(UNFINISHED):
            path.unlink()
        job = Job(folder, rows)
        with job.writing():
            yield job


def _job(given: Sequence[Row], asked: Mapping[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(_json([row.told() for row in given]).encode()).hexdigest()
    return {**asked, "rows": len(given), "prompts": digest}


def check(folder: Path, given: Sequence[Row], asked: Mapping[str, Any]) -> None:
    """UserError unless the folder is new, empty, or of this very job; see `opened`."""
    path, job = folder / JOB, _job(given, asked)
    if not folder.exists():
        check_writable(folder, "--out")
        return
    if not folder.is_dir():
        raise UserError(f"--out {folder} is a file; with --prompts give a folder")
    if not path.exists():
        others = [p.name for p in folder.iterdir() if p.name != LOCK and not p.match(UNFINISHED)]
        if others:
            raise UserError(
                f"--out {folder} holds {min(others)}, which belongs to no job; give a new folder"
            )
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged; give a new folder") from error
    for name in sorted(asked.keys() | before.keys() - job.keys()):
        if before.get(name) != job.get(name):
            raise UserError(
                f"--out {folder} was begun with {name} {before.get(name)}; got {job.get(name)}."
                " Give the same options, or a new folder"
            )
    if before != job:
        raise UserError(
            f"--out {folder} holds a job with other prompts; give the same file, or a new folder"
        )


def _line(text: str) -> dict[str, Any] | None:
    """A line of a manifest; None for one that was cut off."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    whole = isinstance(line, dict) and isinstance(line.get("row"), int)
    return line if whole else None


def _write(path: Path, picture: bytes) -> None:
    with path.open("wb") as file:
        file.write(picture)
        file.flush()
        os.fsync(file.fileno())  # a rename may reach the disk before what it names


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
