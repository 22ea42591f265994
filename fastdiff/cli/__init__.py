"""The command line: parse, call one function, print. Data on stdout, progress on stderr."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from fastdiff import installed
from fastdiff.cli import (  # noqa: F401  each adds its commands
    compare,
    doctor,
    draw,
    env,
    export,
    facts,
    graph,
    measure,
    report,
    roofline,
    serve,
    warm,
)
from fastdiff.cli.options import app
from fastdiff.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Error numbers of a file system that takes no more data."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments`, the process's own if None, and exit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # hide the advice that other libraries print
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        try:
            app(arguments, prog_name="fastdiff", obj=arguments)
        finally:
            sys.stdout.flush()  # raises here if the disk is full, not at exit
    except UserError as error:
        _refuse(str(error))
    except Exception as error:
        if sentence := _missing(error, arguments) or _full(error) or installed.clash():
            _refuse(sentence)
        traceback.print_exc()  # a bug of ours
        sys.exit(2)  # Python would exit with 1, which means "slower"


def _refuse(sentence: str) -> NoReturn:
    """Print the sentence in red and exit with 2."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"fastdiff: {sentence}", style="red", markup=False
    )
    sys.exit(2)


def _missing(error: BaseException | None, arguments: Sequence[str]) -> str | None:
    """If a missing optional package caused the error: which one, and the extra that installs it."""
    while error is not None:  # diffusers and transformers wrap it in their own errors
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if isinstance(error, ImportError):
            if f"{installed.DISTRIBUTION}[" in reason:
                return reason
            words = re.findall(r"\w+", error.name or reason)
            package = next((word for word in words if word in installed.EXTRAS), None)
            if package is not None and "fastdiff" not in words:
                how = installed.pip(installed.EXTRAS[package])
                return f"{arguments[0]} needs {package} ({reason}); {how}"
        error = error.__cause__ or error.__context__
    return None


def _full(error: Exception) -> str | None:
    """A sentence for a full or read-only disk, if that is the error; else None."""
    if not isinstance(error, OSError) or error.errno not in FULL:
        return None
    if sys.stdout is sys.__stdout__:  # Python would write the rest again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}; make room and run it again"
