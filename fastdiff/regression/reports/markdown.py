"""A comparison as GitHub-flavoured Markdown, for a pull request's comment or a job's summary."""

import re
from collections.abc import Iterable, Sequence

from fastdiff.regression.comparison import Comparison, Line
from fastdiff.regression.reports import words

MARKER = "<!-- fastdiff-report -->"
"""A bot finds its comment by this line, and edits it instead of adding one per push."""
LIMIT = 65_000
"""Characters; GitHub's limit for a comment is 65,536."""
HEADER = ("", "name", "base", "new", "ratio [interval]", "n")
WHOLE = "the HTML and JSON reports have all"

_SPECIAL = re.compile(r"[^\w ,.()=+%…·×–→-]|_|(?<=www)\.", re.IGNORECASE)


def markdown(comparison: Comparison, whole: str = WHOLE) -> str:
    """A headline, a table of the changes and, folded, the unchanged rows and the environment.

    whole: where to find the rows for which a comment has no room.
    """
    changed = [line for line in comparison.lines if line.verdict != "same"]
    same = [line for line in comparison.lines if line.verdict == "same"]
    mark = {0: "✅", 1: "❌"}.get(comparison.exit_code, "❔")
    head = [MARKER, f"### {mark} {words.headline(comparison)}", ""]
    head += [
        f"{_text(words.case(comparison))}{_code(comparison.base.name)} →"
        f" {_code(comparison.new.name)}, {words.rule(comparison)}."
    ]
    mean = []
    if comparison.geomean:
        value = words.geomean(comparison.geomean)
        mean = [_row(("", "geometric mean of the times", "", "", f"**{value}**", ""))]
    environment = _environment(comparison, whole)
    # left for headers, "more" rows and tags
    room = LIMIT - _size([*head, *mean, *environment]) - 1_500
    rows, left = _fit(map(_line, changed), len(changed), room * 3 // 4, whole)
    notes = _notes(changed[: len(rows)], room - _size(rows))
    room -= _size(rows) + _size(notes)
    folded, left_same = _fit(map(_line, same), len(same), room, whole)

    parts = list(head)
    if rows or mean or left:
        parts += ["", _row(HEADER), _row(["---", "---", "--:", "--:", "--:", "--:"])]
        parts += [*rows, *mean, *left]
    parts += ["", *notes] if notes else []
    if same:
        table = [_row(HEADER), _row(["---", "---", "--:", "--:", "--:", "--:"]), *folded]
        parts += _details(f"{len(same)} the same", [*table, *left_same])
    parts += environment
    return "\n".join(parts) + "\n"


def _line(line: Line) -> str:
    return _row(
        (
            f"{words.MARKS[line.verdict]} {words.verdict(line)}",
            _code(line.name),
            _text(words.amount(line.base, line.unit)),
            _text(words.amount(line.new, line.unit)),
            words.change(line.ratio, line.lo, line.hi),
            words.rounds(line),
        )
    )


def _notes(lines: Sequence[Line], room: int) -> list[str]:
    """Why rows are undecided, for as many as there is room."""
    noted = [f"- {_code(line.name)}: {_text(line.note)}" for line in lines if line.note]
    kept, _ = _fit(noted, len(noted), room, "")
    return kept


def _environment(comparison: Comparison, whole: str) -> list[str]:
    base, new = comparison.base, comparison.new
    rows = [
        ("state", _code(base.name), _code(new.name)),
        ("commit", _code(base.commit or words.NONE), _code(new.commit or words.NONE)),
        ("created", _text(base.created or words.NONE), _text(new.created or words.NONE)),
        ("machine", _text(words.where(base.machine)), _text(words.where(new.machine))),
    ]
    rows += [
        (_text(name) + (" ⚠️" if a != b else ""), _text(a), _text(b))
        for name, a, b in words.versions(comparison)
    ]
    table, left = _fit(map(_row, rows), len(rows), 12_000, whole)
    differences = [f"- {_text(sentence)}" for sentence in comparison.differences]
    sentences, _ = _fit(differences, len(differences), 6_000, whole)
    content = [_row(("", "base", "new")), _row(["---"] * 3), *table, *left, "", *sentences]
    command = [f"Command: {_code(comparison.command)}", "", f"{words.outcome(comparison)}."]
    count = len(comparison.differences)
    title = f"Environment: {count or 'no'} {'difference' if count == 1 else 'differences'}"
    return _details(title, [*content, "", *command])


def _details(title: str, content: Iterable[str]) -> list[str]:
    # GitHub reads Markdown inside HTML only after an empty line
    return ["", f"<details><summary>{title}</summary>", "", *content, "", "</details>"]


def _fit(rows: Iterable[str], total: int, room: int, whole: str) -> tuple[list[str], list[str]]:
    """The rows that fit into `room` characters, and a row with the number of the others."""
    kept: list[str] = []
    for row in rows:
        room -= len(row) + 1
        if room < 0:
            break
        kept.append(row)
    left = total - len(kept)
    return kept, ([_row(("", f"and {left} more; {whole}", "", "", "", ""))] if left else [])


def _size(lines: Iterable[str]) -> int:
    return sum(len(line) + 1 for line in lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(text: str) -> str:
    """Plain text: no markup, table cell, link, mention or issue number."""
    # GitHub finds @name and #1 even when written as entities; a zero-width space prevents both
    return re.sub(r"(&#64;|&#35;)", r"\1&#8203;", _escape(words.plain(text)))


def _code(text: str) -> str:
    return f"<code>{_escape(words.plain(text))}</code>"


def _escape(text: str) -> str:
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", text)
