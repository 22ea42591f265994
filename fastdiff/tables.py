"""Tables that stay readable at any width: rows of a wide one take several lines, each its own."""

import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

PIPED_WIDTH = 80
"""Columns where nobody tells how many there are: what goes to a file is read on any terminal."""
LEAST_NAME = 24
"""Columns to which names may be wrapped before the cells beside them take one line more."""


@dataclass(frozen=True)
class Row:
    """Cells, the name first; text or rich's `Text`, a line each. Missing ones are empty."""

    cells: Sequence[Any]
    style: str = ""
    apart: bool = False
    """Whether a line is drawn above it."""


def width() -> int:
    """Columns of the terminal, of COLUMNS elsewhere, else PIPED_WIDTH."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    return console.width if console.is_terminal or _told() else PIPED_WIDTH


def printer(file: Any = None, columns: int | None = None) -> Any:
    """A console on stdout, or a file, that is so many columns wide; as `width` if None."""
    from rich.console import Console

    return Console(file=file or sys.stdout, highlight=False, width=columns or width())


def show(
    console: Any, title: Any, head: Sequence[str], rows: Sequence[Row], left: Collection[str] = ()
) -> None:
    """Print a table as wide as `console`, and no cell of it cut.

    The first column names the rows and is wrapped between words. Where the others do not fit beside
    it they are stacked, and their headings likewise: two to a column, or three, …

    left: headings of columns that hold words; numbers stand at the right.
    """
    from rich.table import Table
    from rich.text import Text

    def texts(cells: Sequence[Any]) -> list[Any]:
        filled = [*cells, *[""] * (len(head) - len(cells))]
        return [cell if isinstance(cell, Text) else Text(cell) for cell in filled]

    lines = [texts(head), *(texts(row.cells) for row in rows)]
    sizes = [max(cells[at].cell_len for cells in lines) for at in range(len(head))]
    words = [word for cells in lines for word in cells[0].plain.split()]
    # a word as long as that, say a path, is wrapped anywhere
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
            parts += [Text()] * (height - len(parts))  # what is short begins at the top, too
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
    """Which columns stand on one another, so that they fit into `room` beside the names."""
    count = len(sizes) - 1
    stacks: list[list[int]] = []
    for height in range(1, count + 1):
        across = -(-count // height)
        stacks = [list(range(1 + at, len(sizes), across)) for at in range(across)]
        if _framed([max(sizes[at] for at in stack) for stack in stacks]) <= room:
            break
    return stacks


def _framed(sizes: Sequence[int]) -> int:
    """Of columns with the lines and the space beside them."""
    return sum(sizes) + 3 * len(sizes) + 2


def _columns(word: str) -> int:
    from rich.cells import cell_len

    return cell_len(word)


def _told() -> bool:
    return os.environ.get("COLUMNS", "").isdigit()
