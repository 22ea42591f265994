"""The pairwise cover of a product that `make test` runs."""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
from covered import cover, covered, first_of_each


def fast(parameters):
    """The values of the parameters that `make test` runs."""
    return [
        parameter.values
        for parameter in parameters
        if "product" not in [mark.name for mark in parameter.marks]
    ]


def tuples(rows, together):
    return {t for row in rows for t in itertools.combinations(enumerate(row), together)}


@pytest.mark.parametrize("together", [1, 2, 3])
def test_each_possible_tuple_is_covered_although_some_rows_are_excluded(together):
    drawn = random.Random(together)
    for _ in range(20):
        sizes = [drawn.randint(1, 5) for _ in range(4)]
        rows = [row for row in itertools.product(*map(range, sizes)) if drawn.random() < 0.7]
        taken = cover(rows, together)
        assert taken <= set(rows)
        assert tuples(taken, together) == tuples(rows, together)


def test_a_pairwise_cover_is_as_large_as_its_two_longest_axes():
    rows = list(itertools.product(range(8), range(4), range(2), range(2)))
    assert len(cover(rows, 2)) == 32
    assert len(cover(rows, 1)) == 8


def test_all_rows_are_parameters_in_the_order_of_the_product():
    parameters = covered("ab", [1, 2, 3], [None, True])
    wanted = list(itertools.product("ab", [1, 2, 3], [None, True]))
    assert [parameter.values for parameter in parameters] == wanted
    assert len(fast(parameters)) == 6
    assert parameters[1].id == "a-1-True"


def test_rows_that_always_run_count_as_covered_and_impossible_rows_are_left_out():
    parameters = covered(
        range(4),
        range(4),
        range(4),
        always=lambda a, b, c: a == 3,
        possible=lambda a, b, c: b < 3,
    )
    assert all(b < 3 for _, b, _ in (parameter.values for parameter in parameters))
    runs = fast(parameters)
    assert [row for row in runs if row[0] == 3] == list(itertools.product([3], range(3), range(4)))
    # those rows cover all pairs of b and c; the other rows cover the pairs with a
    assert len(runs) == 12 + 3 * 4


def test_values_keep_their_own_names_and_marks():
    both = pytest.param("linear", 3, id="three", marks=pytest.mark.slow)
    (parameter,) = covered([both], [int])
    assert parameter.values == ("linear", 3, int)
    assert parameter.id == "three-int"
    assert [mark.name for mark in parameter.marks] == ["slow"]


def test_values_are_used_evenly():
    runs = fast(covered(range(20), range(5), together=1))
    assert len(runs) == 20
    assert sorted(b for _, b in runs) == sorted([*range(5)] * 4)


def test_the_first_of_each_kind_and_rows_that_always_run_are_chosen():
    parameters = first_of_each(
        [(1, 2), pytest.param(3, 4), pytest.param(5, 4), pytest.param(6, 4)],
        kind=lambda *values: values[-1],
        always=lambda *values: values[0] == 6,
    )
    assert len(parameters) == 4
    assert fast(parameters) == [((1, 2),), (3, 4), (6, 4)]


def test_each_process_marks_the_same_rows():
    """Workers of one run must collect the same tests, so string hashes must not matter."""
    program = (
        "from covered import covered\n"
        "print([len(p.marks) for p in covered('abcd', 'efg', 'hij', 'kl')])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parent,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in "012"
    }
    assert len(printed) == 1
