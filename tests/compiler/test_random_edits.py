"""Random sequences of three edits, compared with the same edits in eager.

`PYTHONPATH=tests python -m edits WORD` tries single edits by name; `python -m edits random` lists
all sequences with a fault.
"""

import pytest
from edits import KINDS, TABLE
from edits.sequences import alone, drawn_at_random, first_fault

NUMBERS = range(120)
FAST = 25
"""The number that `make test` runs; `make test-all` runs all."""


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(
            number,
            id=f"sequence-{number}",
            marks=[pytest.mark.product] if number >= FAST else [],
        )
        for number in NUMBERS
    ],
)
def test_random_edits(number):
    """After each edit the compiled pipeline draws, raises and saves what the eager one does."""
    sequence = drawn_at_random(number)
    fault = first_fault(sequence)
    assert fault is None, f"{sequence}: {fault}"


@pytest.mark.slow
@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("edit", TABLE.values(), ids=TABLE)
def test_each_edit(edit, when):
    """Each edit of the table alone, after compile and before it."""
    sequence = alone(edit, int(when == "before"))
    fault = first_fault(sequence)
    assert fault is None, f"{sequence}: {fault}"


def test_sequences_cover_all_kinds_and_half_of_the_rows():
    drawn = [edit for number in NUMBERS for edit in drawn_at_random(number).edits]
    assert {edit.kind for edit in drawn} == set(KINDS)
    assert len({edit.id for edit in drawn}) > len(TABLE) / 2
