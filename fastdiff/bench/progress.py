"""What is under way, on stderr: a spinner or a bar on a terminal, plain lines elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def status() -> Iterator[Any]:
    """A function that shows one line: a spinner on a terminal, else plain lines."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda line: console.print(line, markup=False)
        return
    with console.status("loading") as spinner:
        yield spinner.update


@contextmanager
def step_bar(iterable: None = None, total: int | None = None) -> Iterator[Any]:
    """Stands in for a pipeline's `progress_bar`: the same calls, drawn by rich."""
    from types import SimpleNamespace

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("denoising", total=total)
        yield SimpleNamespace(update=lambda steps=1: progress.advance(task, steps))
