"""Files that are whole or absent, and one sentence where the system takes none."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastdiff.errors import UserError


@contextmanager
def told(out: Path) -> Iterator[None]:
    """UserError where the system refuses what `out` needs: a full disk, a closed folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside `path`, then rename it: all of it or nothing.

    What a link leads to is replaced, not the link; a device or a pipe is written to as it is.

    Raises:
        UserError: the system refuses, say on a full disk; `path` is then what it was.
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
            temporary.chmod(0o644)  # mkstemp's files are for their owner alone
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_file` of a text, as UTF-8."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def afterwards(path: Path | None, text: Callable[[], str]) -> Iterator[None]:
    """Write `text()` once the block has shown what is in it: no full disk loses what was measured,
    and no closed pipe what was to be kept."""
    try:
        yield
    finally:
        if path is not None:
            write_text(path, text())


@contextmanager
def so_far(path: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that writes what is known so far, so that a run which is killed leaves that.

    A pipe or device hears nothing of it: it takes one text, the last. Where the block refuses with
    UserError, nothing is left.
    """
    file = None if path is None or (path.exists() and not path.is_file()) else path

    def keep(text: str) -> None:
        if file is not None:
            with suppress(UserError):  # a full disk does not end the run; the last text says so
                write_text(file, text)

    try:
        yield keep
    except UserError:
        if file is not None:
            file.unlink(missing_ok=True)
        raise


def check_writable(path: Path, option: str) -> None:
    """Raise UserError unless `path` can become a file; before an hour of work, not after."""
    with told(path):  # of a name too long, or a folder on the way that is closed to us
        folder = Path(os.path.realpath(path)).parent
        if not folder.exists():
            raise UserError(
                f"{option} {path}: the folder {path.parent} does not exist; make it first"
            )
        if not folder.is_dir():
            raise UserError(f"{option} {path}: {path.parent} is no folder; give another name")
        if path.is_dir():
            raise UserError(f"{option} {path} is a folder; give a file name")
        if path.exists() and not path.is_file():
            folder = path  # a device, which is not replaced
        if not os.access(folder, os.W_OK):
            raise UserError(f"{option} {path}: {folder} cannot be written to; give another name")
