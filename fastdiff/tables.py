"""Tables that stay readable at any width: each row of a wide table takes several lines."""

import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

PIPED_WIDTH = 80
"""Columns to print when the width is unknown, as in a file: any terminal can show this many."""
LEAST_NAME = 24
"""The name column may be wrapped down to this width before the other cells are stacked."""


@dataclass(frozen=True)
class Row:
    """The cells of a row, name first. Each is a string or rich's `Text`. Missing cells are
    empty."""

    cells: Sequence[Any]
    style: str = ""
    apart: bool = False
    """Whether to draw a line above the row."""


def plural(count: int, noun: str) -> str:
    """ "1 call", "2 calls"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def width() -> int:
    """The terminal's width in columns; elsewhere the variable COLUMNS, or else PIPED_WIDTH."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    return console.width if console.is_terminal or _told() else PIPED_WIDTH


def printer(file: Any = None, columns: int | None = None) -> Any:
    """A console that prints to stdout or to `file`, `columns` wide, by default `width()`."""
    from rich.console import Console

    return Console(file=file or sys.stdout, highlight=False, width=columns or width())


def show(
    console: Any, title: Any, head: Sequence[str], rows: Sequence[Row], left: Collection[str] = ()
) -> None:
    """Print a table as wide as `console` without cutting any cell.

    The first column names the rows and is wrapped between words. If the other columns do not fit
    beside it, they are stacked, as are their headings: two to a column, or three, and so on.

    left: headings of the columns that hold words and are aligned left; all others align right.
    """
    from rich.table import Table
    from rich.text import Text

    def texts(cells: Sequence[Any]) -> list[Any]:
        filled = [*cells, *[""] * (len(head) - len(cells))]
        return [cell if isinstance(cell, Text) else Text(cell) for cell in filled]

    lines = [texts(head), *(texts(row.cells) for row in rows)]
    sizes = [max(cells[at].cell_len for cells in lines) for at in range(len(head))]
    words = [word for cells in lines for word in cells[0].plain.split()]
    # a word longer than half the width, such as a path, is wrapped anywhere
    longest = min(max(map(_columns, words), default=1), console.width // 2)
    name = min(sizes[0], max(LEAST_NAME, longest))
    stacks = _stacks(sizes, console.width - name)
    taken = [max(sizes[at] for at in stack) for stack in stacks]
    name = max(name, min(sizes[0], console.width - _framed(taken)))
    height = max(map(len, stacks), default=1)

    def stacked(cells: Sequence[Any]) -> list[Any]:
        found = []
        for stack, size in zip(stacks, taken, strict=True):
            parts = [cells[at].copy() for at in stack]
            for at, part in zip(stack, parts, strict=True):
                part.align("left" if head[at] in left else "right", size)
            parts += [Text()] * (height - len(parts))  # a short stack starts at the top, too
            found.append(Text("\n").join(parts))
        return [cells[0], *found]

    table = Table(pad_edge=False, show_lines=height > 1 or name < sizes[0])
    for heading, size in zip(stacked(lines[0]), (name, *taken), strict=True):
        table.add_column(heading, width=size, overflow="fold")
    for row, cells in zip(rows, lines[1:], strict=True):
        if row.apart:
            table.add_section()
        table.add_row(*stacked(cells), style=row.style)
    console.print(title if isinstance(title, Text) else Text(title, style="italic"))
    there, console.width = console.width, max(console.width, name + _framed(taken))
    console.print(table)
    console.width = there


def below(console: Any, lines: Sequence[str]) -> None:
    """Print what a reader of the table above needs to know, a line or more for each."""
    from rich.text import Text

    for line in lines:
        console.print(Text(line, style="dim"))


def _stacks(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Groups of column indices to stack so that the columns fit into `room` beside the names."""
    count = len(sizes) - 1
    stacks: list[list[int]] = []
    for height in range(1, count + 1):
        across = -(-count // height)
        stacks = [list(range(1 + at, len(sizes), across)) for at in range(across)]
        if _framed([max(sizes[at] for at in stack) for stack in stacks]) <= room:
            break
    return stacks


def _framed(sizes: Sequence[int]) -> int:
    """The width of columns together with their borders and padding."""
    return sum(sizes) + 3 * len(sizes) + 2


def _columns(word: str) -> int:
    from rich.cells import cell_len

    return cell_len(word)


def _told() -> bool:
    return os.environ.get("COLUMNS", "").isdigit()
