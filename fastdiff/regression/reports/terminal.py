"""A comparison as a table on stdout."""

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastdiff.regression.comparison import Comparison, Line
from fastdiff.regression.reports import words

PIPED_WIDTH = 140  # as bench.report's, whose import takes torch and three seconds
STYLES = {
    "slower": "bold red",
    "faster": "green",
    "same": "dim",
    "inconclusive": "yellow",
    "incomparable": "yellow",
}


def show(comparison: Comparison, everything: bool = False) -> None:
    """Print what changed, worst first, and what a reader needs to believe it.

    everything: the rows that did not change, too, instead of their number.
    """
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    table = Table(title=Text(words.headline(comparison)), title_justify="left", pad_edge=False)
    table.add_column("name", overflow="fold", ratio=1)
    for name in ("base", "new", "ratio [interval]", "verdict", "n"):
        table.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    same = [line for line in comparison.lines if line.verdict == "same"]
    changed = [line for line in comparison.lines if line.verdict != "same"]
    for line in changed + (same if everything else []):
        table.add_row(*_cells(line), style="dim" if line.verdict == "same" else "")
    if same and not everything:
        names = "row is" if len(same) == 1 else "rows are"
        table.add_row(Text(f"{len(same)} {names} the same", style="dim"), *[""] * 5)
    if comparison.geomean:
        table.add_section()
        mean = words.geomean(comparison.geomean)
        table.add_row("geometric mean of the times", "", "", mean, "", "")
    console.print(table)
    for line in changed:
        if line.note:
            note = f"{words.plain(line.name)}: {words.plain(line.note, 400)}"
            console.print(Text(note, style="yellow"))
    for footer in _footer(comparison):
        console.print(Text(footer, style="dim"))
    code = comparison.exit_code
    style = {0: "green", 1: "bold red"}.get(code, "yellow")
    console.print(Text(words.outcome(comparison), style=style))


def _cells(line: Line) -> list[str | Text]:
    return [
        Text(words.plain(line.name)),
        words.amount(line.base, line.unit),
        words.amount(line.new, line.unit),
        words.change(line.ratio, line.lo, line.hi),
        Text(words.verdict(line), style=STYLES[line.verdict]),
        words.rounds(line),
    ]


def _footer(comparison: Comparison) -> list[str]:
    differ = [f"{name} {a} → {b}" for name, a, b in words.versions(comparison) if a != b]
    return [
        f"{words.case(comparison)}base {words.state(comparison.base)};"
        f" new {words.state(comparison.new)}",
        words.machines(comparison),
        "versions: " + (", ".join(differ) if differ else "the same"),
        *(words.plain(sentence, 400) for sentence in comparison.differences),
        words.rule(comparison),
        words.plain(comparison.command, 400),
    ]
