"""The command line: parse, call one function, print. Data on stdout, progress on stderr."""

import os
import sys
import traceback
from collections.abc import Sequence

from fastdiff.cli import draw, export, facts, graph, measure, report  # noqa: F401  each adds its commands
from fastdiff.cli.options import app
from fastdiff.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments`, the process's own if None, and exit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Loading bars and advice of the libraries below are not what was asked for.
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        app(arguments, prog_name="fastdiff", obj=arguments)
    except UserError as error:
        from rich.console import Console

        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"fastdiff: {error}", style="red", markup=False
        )
        sys.exit(2)
    except Exception:  # a fault of ours; Python's own exit code for it is 1, which says "slower"
        traceback.print_exc()
        sys.exit(2)
