"""A comparison as a table on stdout."""

from rich.text import Text

from fastdiff import tables
from fastdiff.regression.comparison import Comparison, Line
from fastdiff.regression.reports import words

HEAD = ("name", "base", "new", "ratio [interval]", "verdict", "n")
STYLES = {
    "slower": "bold red",
    "faster": "green",
    "same": "dim",
    "inconclusive": "yellow",
    "incomparable": "yellow",
}


def show(comparison: Comparison, everything: bool = False) -> None:
    """Print the changes, worst first, with machine, versions and method.

    everything: also print the unchanged rows instead of their number.
    """
    console = tables.printer()
    same = [line for line in comparison.lines if line.verdict == "same"]
    changed = [line for line in comparison.lines if line.verdict != "same"]
    rows = [
        tables.Row(_cells(line), "dim" if line.verdict == "same" else "")
        for line in changed + (same if everything else [])
    ]
    if same and not everything:
        names = "row is" if len(same) == 1 else "rows are"
        rows.append(tables.Row([f"{len(same)} {names} the same"], "dim"))
    if comparison.geomean:
        mean = words.geomean(comparison.geomean)
        rows.append(tables.Row(["geometric mean of the times", "", "", mean], apart=True))
    tables.show(console, words.headline(comparison), HEAD, rows, left=("verdict",))
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
