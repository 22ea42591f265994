"""Files written whole or not at all; a system error becomes one sentence."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastdiff.errors import UserError


@contextmanager
def told(out: Path) -> Iterator[None]:
    """Turn an OSError into a UserError about `out`: a full disk, a folder without permission."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside `path`, then rename it: all of it or nothing.

    A symbolic link is kept, and its target replaced. A device or a pipe is written to directly.

    Raises:
        UserError: the system refuses, for example on a full disk; `path` is unchanged then.
    """
    with told(path):
        if path.exists() and not path.is_file():
            write(path)
            return
        path = Path(os.path.realpath(path))
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".fastdiff-", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o644)  # mkstemp makes files that only their owner may read
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_file` for text, encoded as UTF-8."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def afterwards(path: Path | None, text: Callable[[], str]) -> Iterator[None]:
    """Write `text()` after the block, even if the block raises.

    So results reach the screen even on a full disk, and the file even on a closed pipe.
    """
    try:
        yield
    finally:
        if path is not None:
            write_text(path, text())


@contextmanager
def so_far(path: Path | None) -> Iterator[Callable[[str], None]]:
    """Yield a function that writes the results so far, so that a killed run leaves them behind.

    A pipe or device is skipped: it takes one text, the last. If the block raises UserError, the
    file is removed.
    """
    file = None if path is None or (path.exists() and not path.is_file()) else path

    def keep(text: str) -> None:
        if file is not None:
            # a full disk does not end the run; the final write reports it
            with suppress(UserError):
                write_text(file, text)

    try:
        yield keep
    except UserError:
        if file is not None:
            file.unlink(missing_ok=True)
        raise


def check_writable(path: Path, option: str) -> None:
    """Raise UserError unless `path` can be written; checks before an hour of work, not after."""
    with told(path):  # the name may be too long, or a parent folder closed to us
        folder = Path(os.path.realpath(path)).parent
        if not folder.exists():
            raise UserError(
                f"{option} {path}: the folder {path.parent} does not exist; make it first"
            )
        if not folder.is_dir():
            raise UserError(f"{option} {path}: {path.parent} is not a folder; give another name")
        if path.is_dir():
            raise UserError(f"{option} {path} is a folder; give a file name")
        if path.exists() and not path.is_file():
            folder = path  # a device is written in place
        if not os.access(folder, os.W_OK):
            raise UserError(f"{option} {path}: {folder} cannot be written to; give another name")
