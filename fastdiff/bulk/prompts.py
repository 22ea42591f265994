"""The file of `fastdiff generate --prompts`: a row for each picture."""

import csv
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdiff import installed
from fastdiff.errors import UserError, first_line

OWN = ("prompt", "seed", "steps", "guidance", "negative", "size")
"""The columns that describe a picture."""
TAKEN = ("row", "file", "width", "height", "bytes", "sha256", "error")
"""Names that the manifest needs for itself."""
SEEDS = 2**63
SIZE = re.compile(r"([1-9]\d{0,5})\s*[x×]\s*([1-9]\d{0,5})")


@dataclass(frozen=True)
class Row:
    """A picture to draw. None: the job's or the pipeline's default."""

    number: int
    """From 1 on."""
    line: int
    """Its line in the file, from 1 on."""
    prompt: str
    seed: int
    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    width: int | None = None
    """In pixels, as `height`."""
    height: int | None = None
    carried: Mapping[str, Any] = field(default_factory=dict)
    """The other columns."""

    def told(self) -> dict[str, Any]:
        """The row in the manifest, as far as it is given."""
        own = (self.prompt, self.seed, self.steps, self.guidance, self.negative)
        names = (*OWN[:5], "width", "height")
        values = zip(names, (*own, self.width, self.height), strict=True)
        return {name: value for name, value in values if value is not None} | dict(self.carried)


def read(path: Path, seed: int) -> list[Row]:
    """The rows of a .txt (a prompt in each line), .csv, .jsonl or .parquet file.

    seed: of the job. A row without a seed gets one that is computed from this, its number
    and its prompt.

    Raises UserError for a file that cannot be read; the first row that is wrong is named by its
    line.
    """
    kinds: dict[str, Callable[[Path], Iterator[tuple[int, Mapping[str, Any]]]]] = {
        ".txt": _lines,
        ".csv": _csv,
        ".jsonl": _jsonl,
        ".parquet": _parquet,
    }
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"--prompts {path}: give a file that ends in {', '.join(kinds)}")
    try:
        rows = [
            _row(path, number, line, values, seed)
            for number, (line, values) in enumerate(kind(path), 1)
        ]
    except OSError as error:
        raise UserError(f"--prompts {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path} is not UTF-8: {error.reason}") from error
    if not rows:
        raise UserError(f"--prompts {path} holds no prompt")
    return rows


def bad(path: Path, line: int, what: str) -> UserError:
    """The error for a row."""
    return UserError(f"{path}, line {line}: {what}")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = path.read_text(encoding="utf-8-sig")
    for line, prompt in enumerate(text.splitlines(), 1):
        if prompt.strip():
            yield line, {"prompt": prompt.strip()}


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            names = reader.fieldnames or []
            if "prompt" not in names:
                found = ", ".join(names) or "nothing"
                raise bad(path, 1, f"the columns are {found}; one must be prompt")
            if twice := {name for name in names if names.count(name) > 1}:
                raise bad(path, 1, f"two columns are called {min(twice)!r}; rename one")
            for row in reader:
                if None in row:
                    raise bad(path, reader.line_num, "it has more values than there are columns")
                # an empty cell means the default
                yield reader.line_num, {name: value or None for name, value in row.items()}
        except csv.Error as error:
            raise bad(path, reader.line_num, f"it is not CSV: {error}") from error


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise bad(path, line, f"it is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise bad(path, line, f'it is {text.strip()[:40]!r}; give {{"prompt": "…"}}')
            yield line, row


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"--prompts {path} needs pyarrow; {installed.pip('bulk')}") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except pyarrow.ArrowException as error:
        raise UserError(f"--prompts {path} is not a Parquet file: {first_line(error)}") from error


def _row(path: Path, number: int, line: int, values: Mapping[str, Any], job_seed: int) -> Row:
    """One row, checked."""

    def wrong(name: str, wanted: str) -> UserError:
        return bad(path, line, f"{name} is {values[name]!r}; give {wanted}")

    if taken := sorted(values.keys() & set(TAKEN)):
        raise bad(path, line, f"the column {taken[0]!r} is the manifest's own; rename it")
    given = {name: value for name, value in values.items() if value is not None}
    prompt, negative = given.get("prompt"), given.get("negative")
    if prompt is None or prompt == "":
        raise bad(path, line, "it has no prompt")
    for name in ("prompt", "negative"):
        if not isinstance(given.get(name, ""), str):
            raise wrong(name, "a text")
    seed, steps = (_whole(given.get(name)) for name in ("seed", "steps"))
    if "seed" in given and (seed is None or not 0 <= seed < SEEDS):
        raise wrong("seed", "a whole number from 0 to 2⁶³ - 1")
    if "steps" in given and (steps is None or steps < 1):
        raise wrong("steps", "a whole number of at least 1")
    guidance = _number(given.get("guidance"))
    if "guidance" in given and guidance is None:
        raise wrong("guidance", "a number, such as 4")
    width, height = None, None
    if "size" in given:
        found = SIZE.fullmatch(str(given["size"]).strip())
        if found is None:
            raise wrong("size", "width x height in pixels, such as 512x512")
        width, height = int(found[1]), int(found[2])
    return Row(
        number=number,
        line=line,
        prompt=str(prompt),
        seed=_derived(job_seed, number, str(prompt)) if seed is None else seed,
        steps=steps,
        guidance=guidance,
        negative=negative,
        width=width,
        height=height,
        carried={n: _plain(v) for n, v in values.items() if n not in OWN},
    )


def _derived(job_seed: int, number: int, prompt: str) -> int:
    """A seed that is the same in every run, and another one for every row; of 53 bits, which every
    reader of JSON keeps."""
    told = hashlib.sha256(f"{job_seed}\n{number}\n{prompt}".encode()).digest()
    return int.from_bytes(told[:8]) >> 11


def _number(value: Any) -> float | None:
    """A finite number, or its text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _whole(value: Any) -> int | None:
    """A whole number, or its text; None for anything else."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*-?[0-9]{1,20}\s*", value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if math.isfinite(value) and value == int(value) else None


def _plain(value: Any) -> Any:
    """A column's value as JSON holds it; dates, decimals and bytes as their text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)
