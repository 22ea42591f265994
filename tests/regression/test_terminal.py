"""The table that `fastdiff report` prints."""

import pytest
from regression import synthetic

from fastdiff.regression.reports.terminal import show


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A terminal wide enough for one line per row; tests/test_widths.py has narrower ones."""
    monkeypatch.setenv("COLUMNS", "140")


def printed(capsys, *arguments, **options):
    show(*arguments, **options)
    return capsys.readouterr().out


def test_changed_rows_come_first_and_equal_rows_are_counted(capsys):
    comparison = synthetic.comparison()
    out = printed(capsys, comparison)
    assert "9 rows are the same" in out
    assert "demo, float32 · networks · step" not in out
    rows = [line for line in out.splitlines() if "│" in line]
    assert "slower" in rows[0]
    assert "geometric mean" in rows[-1]
    assert "1.008 [0.994, 1.021]" in rows[-1]
    for fact in (
        "main (1b4daea, 2026-11-20T09:30:00+00:00)",
        "working tree (bcef219-dirty)",
        "AMD EPYC",
        "torch 2.13.0+cpu → 2.13.1+cpu",
        "under 3.0% are ignored",
        "at most 5% of the reported changes are due to chance",
        comparison.command,
        "exit code 1: something got slower or larger",
        "6 more processes would settle it",
    ):
        assert fact in out


def test_all_rows_are_shown_on_request(capsys):
    out = printed(capsys, synthetic.comparison(), everything=True)
    assert "rows are the same" not in out
    assert "demo, float32 · networks · step" in out


def test_no_escape_sequence_of_a_hostile_file_reaches_the_terminal(capsys):
    out = printed(capsys, synthetic.hostile(), everything=True)
    assert "\x1b" not in out
    assert "\x00" not in out
    assert "[31mred" in out  # shown as text: names are not rich markup
    assert "[link](javascript" in out


def test_a_comparison_of_nothing_says_so(capsys):
    out = printed(capsys, synthetic.comparison(lines=(), geomean=None))
    assert "Nothing was compared" in out
