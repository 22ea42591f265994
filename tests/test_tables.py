"""Printed tables: no cell is cut at any width, and no line is longer than the width."""

import pytest

from fastdiff import tables
from fastdiff.tables import Row

HEAD = ("kernel", "launches", "ratio [interval]", "verdict", "limited by", "MB", "GFLOP", "n")
NAMES = (
    "eager",
    "channels_last",
    "attention · _flash_kernel · sd15-64-self · float16 · sm_90 · matrix instructions",
    "漢字 · 漢字漢字",
    "a path/without/any/space/that/is/longer/than/any/terminal/is/wide/and/then/some/more.py",
)
ROWS = [
    Row(
        (name, f"1,23{at}", f"1.10{at} [1.081, 1.129]", "inconclusive", "shared memory", f"{at}.5"),
        apart=at == 3,
    )
    for at, name in enumerate(NAMES)
]


def printed(capsys, width, head=HEAD, rows=ROWS):
    tables.show(tables.printer(columns=width), "a title", head, rows, left=("verdict",))
    return capsys.readouterr().out.splitlines()


def cells(lines):
    """The text of each column, with the lines of its cells joined."""
    body = [line for line in lines if line[0] in "│┃"]
    rows = [line[1:-1].split(line[0]) for line in body]
    return ["".join(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 140, 200])
def test_no_cell_is_cut(capsys, width):
    from rich.cells import cell_len

    title, *lines = printed(capsys, width)
    assert title == "a title"
    assert max(map(cell_len, lines)) <= width
    assert len(set(map(cell_len, lines))) == 1  # the frame is straight
    names, *others = cells(lines)
    for name in NAMES:  # wrapped between words; a word too long for a line is wrapped anywhere
        assert "".join(name.split()) in "".join(names.split())
    assert all(f" {word} " in f" {' '.join(names.split())} " for word in NAMES[2].split())
    for cell in (*HEAD[1:], *(cell for row in ROWS for cell in row.cells[1:])):
        assert any(cell in column for column in others), cell


def test_in_a_terminal_too_narrow_for_a_cell_lines_are_not_wrapped(capsys):
    lines = printed(capsys, 20)
    assert any("1.100 [1.081, 1.129]" in line for line in lines)


def test_a_wide_terminal_has_one_line_per_row(capsys):
    lines = printed(capsys, 250)
    assert sum(line[0] == "│" for line in lines) == len(ROWS)


def test_numbers_are_aligned_right_and_words_left(capsys):
    rows = [Row(("a", "1", "faster")), Row(("b", "1,234", "inconclusive"))]
    lines = printed(capsys, 80, ("name", "launches", "verdict"), rows)
    assert "│a    │        1 │ faster      │" in lines
    assert "│b    │    1,234 │ inconclusive│" in lines


def test_a_table_of_names_only(capsys):
    lines = printed(capsys, 80, ("name",), [Row(("one",))])
    assert any("one" in line for line in lines)


def test_without_a_terminal_the_width_is_80_or_that_of_columns(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert tables.width() == tables.printer().width == 80
    monkeypatch.setenv("COLUMNS", "120")
    assert tables.width() == tables.printer().width == 120
