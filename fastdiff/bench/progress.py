"""Progress on stderr: a spinner or a bar on a terminal, plain lines elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def status() -> Iterator[Any]:
    """A function that shows one line: with a spinner on a terminal, else as a plain line."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda line: console.print(Text(line), soft_wrap=True)
        return
    with console.status("loading") as spinner:
        yield lambda line: spinner.update(Text(line))


@contextmanager
def phases() -> Iterator[Any]:
    """`log(line)` as for `status`; `start(phase, parent, steps)`, `step(phase)`, `finish(phase)`.

    On a terminal there is a bar for each phase in progress, below its parent's.
    """
    from types import SimpleNamespace

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        with status() as log:
            yield SimpleNamespace(log=log, start=_nothing, step=_nothing, finish=_nothing)
        return
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    depths: dict[str | None, int] = {None: 0}
    with Progress(*columns, console=console, transient=True) as progress:
        line = progress.add_task("loading", total=None)

        def start(phase: str, parent: str | None, steps: int) -> None:
            depths[phase] = depths.get(parent, 0) + 1
            tasks[phase] = progress.add_task("  " * depths[phase] + escape(phase), total=steps)

        yield SimpleNamespace(
            log=lambda text: progress.update(line, description=escape(text)),
            start=start,
            step=lambda phase: progress.advance(tasks[phase]),
            finish=lambda phase: progress.remove_task(tasks.pop(phase)),
        )


@contextmanager
def shares() -> Iterator[Any]:
    """`show(line, share)`: the share of the work done, 0 to 1, or None if unknown.

    A bar on a terminal, else plain lines.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        with status() as log:
            yield lambda line, share=None: log(line)
        return
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("loading", total=None)

        def show(line: str, share: float | None = None) -> None:
            known = None if share is None else 1.0
            progress.update(task, description=escape(line), total=known, completed=share or 0.0)

        yield show


@contextmanager
def step_bar(iterable: None = None, total: int | None = None) -> Iterator[Any]:
    """Replaces a pipeline's `progress_bar`: the same calls, drawn by rich."""
    from types import SimpleNamespace

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("denoising", total=total)
        yield SimpleNamespace(update=lambda steps=1: progress.advance(task, steps))


SECONDS = 30
"""Seconds between two lines of `pictures` if there is no terminal."""


@contextmanager
def pictures(total: int, done: int) -> Iterator[Any]:
    """`advance()` after each picture: how many there are of `total`, how many a second, and the
    time left. `done`: those that were there before.

    A bar on a terminal, else a line at times.
    """
    import time

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, highlight=False)
    columns = (
        *(TextColumn("drawing"), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("{task.fields[rate]}"), TimeRemainingColumn(elapsed_when_finished=True)),
    )
    begun = shown = time.monotonic()
    first = done

    def rate() -> str:
        return f"{(done - first) / max(time.monotonic() - begun, 1e-9):.2g} a second"

    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=done, rate="")

        def advance() -> None:
            nonlocal done, shown
            done += 1
            progress.update(task, completed=done, rate=rate())
            now = time.monotonic()
            if not console.is_terminal and (now - shown > SECONDS or done == total):
                left = (total - done) * (now - begun) / (done - first)
                minutes = f"{left / 60:.0f} minutes" if left >= 100 else f"{left:.0f} s"
                console.print(f"{done} of {total} drawn, {rate()}, {minutes} left")
                shown = now

        yield advance


def _nothing(*_: object) -> None:
    pass
