"""The words that all reports share, and the escaping of foreign text."""

import pytest
from regression import synthetic

from fastdiff.regression.reports import words


@pytest.mark.parametrize("name", synthetic.HOSTILE)
def test_foreign_text_becomes_one_printable_line(name):
    line = words.plain(name)
    assert line.isprintable()
    assert len(line) <= words.LONGEST
    line.encode("utf-8")


@pytest.mark.parametrize(
    ("value", "unit", "want"),
    [
        (12.3456, "ms", "12.35 ms"),
        (0.0123456, "ms", "0.01235 ms"),
        (12345.6, "ms", "12,346 ms"),
        (0.0, "ms", "0 ms"),
        (8_600_123_457.0, "bytes", "8,600,123,457 bytes"),
        (2.5, "registers", "2.500 registers"),
        (None, "ms", "–"),
        (float("nan"), "bytes", "–"),
        (float("inf"), "ms", "–"),
    ],
)
def test_amounts_have_four_digits_and_units(value, unit, want):
    assert words.amount(value, unit) == want


def test_headlines_count_the_verdicts():
    slower, same = synthetic.time("a", 1.5, 0), synthetic.time("b", 1.0, 1)
    faster, undecided = synthetic.time("c", 0.7, 2), synthetic.time("d", 1.02, 77, processes=1)
    more = synthetic.count("e", 3, 4)

    def headline(*lines):
        return words.headline(synthetic.comparison(lines=lines))

    assert headline(slower, same, more) == "2 of 3 rows got slower · 1 same"
    assert headline(more, faster) == "1 of 2 rows got larger · 1 faster"
    assert headline(faster, same) == "Nothing got slower · 1 faster · 1 same"
    assert headline(undecided, same).startswith("Nothing got slower, but 1 of 2 rows is undecided")
    assert headline() == "Nothing was compared"
    assert words.outcome(synthetic.comparison(lines=())) == "exit code 3: nothing was compared"


def test_machines_of_both_formats_are_named():
    assert words.where(synthetic.MACHINE) == "AMD EPYC, 2 cores, 2 threads, Linux x86_64"
    theirs = {"node": "secret", "system": "Linux", "cpu": {"brand_raw": "Xeon", "count": 4}}
    assert words.where(theirs) == "Xeon, 4 cores, Linux"
    gpu = {"name": "H100", "driver": "570", "cuda": "12.8"}
    assert words.where({"gpu": gpu, "cpu": "EPYC"}) == "H100 (driver 570, CUDA 12.8), EPYC"
    assert words.where({}) == "–"
