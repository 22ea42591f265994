"""One declaration of a cross product for two suites: `make test` runs a part, `make test-all` all.

    @pytest.mark.parametrize(
        ("case", "isa", "dtype"),
        covered(CASES, ISAS, DTYPES, always=lambda case, isa, dtype: case.small),
    )

Every combination is a test. Those outside the cover carry the mark `product`, which `make test`
deselects and `make test-all` runs. The cover is pairwise: any two values of different axes meet in
at least one test of it. A fault that needs two particular values (an odd size and float16) is
found by `make test`; one that needs three may wait for `make test-all`.

Put cheap combinations, and every boundary that has found a fault, in `always`. `possible` leaves
out combinations that do not exist. Two axes have no smaller pairwise cover than their product:
`together=1` then asks for every value of each axis at least once.

`first_of_each` is for parameters of which many are alike, but which are not a product. Some whole
tests are marked `@pytest.mark.product` directly: because a cheaper test, which a comment names,
fails with them, or because they take long and guard what few changes touch.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import pytest

Row = tuple[int, ...]
"""The index of a value on each axis."""


def covered(
    *axes: Iterable[Any],
    together: int = 2,
    always: Callable[..., bool] = lambda *values: False,
    possible: Callable[..., bool] = lambda *values: True,
) -> list[Any]:
    """Parameters of a test: the product of `axes`, the last axis changing fastest.

    A value is anything, or a `pytest.param` of one or more values with its own id and marks.
    `always(*values)` and `possible(*values)` get the arguments of the test. The same axes give the
    same cover in every process.
    """
    choices = [[_parameter(value) for value in axis] for axis in axes]
    joined = {
        row: _joined([axis[i] for axis, i in zip(choices, row, strict=True)])
        for row in itertools.product(*map(range, map(len, choices)))
    }
    rows = [row for row, parameter in joined.items() if possible(*parameter.values)]
    fast = set(rows)  # unless `together` is less than the number of axes, the cover is all rows
    if together < len(choices):
        fast = cover(rows, together, [row for row in rows if always(*joined[row].values)])
    return [joined[row] if row in fast else _marked(joined[row]) for row in rows]


def first_of_each(
    values: Iterable[Any],
    kind: Callable[..., Hashable],
    always: Callable[..., bool] = lambda *values: False,
) -> list[Any]:
    """Parameters of a test: all values. From the second value of a kind on they carry the mark
    `product`, except those for which `always` is true.

    `kind(*values)` and `always(*values)` get the arguments of the test. Sort by cost to keep the
    cheapest.
    """
    parameters, seen = [_parameter(value) for value in values], set()
    for i, parameter in enumerate(parameters):
        this = kind(*parameter.values)
        if this in seen and not always(*parameter.values):
            parameters[i] = _marked(parameter)
        seen.add(this)
    return parameters


def cover(rows: Sequence[Row], together: int, chosen: Iterable[Row] = ()) -> set[Row]:
    """`chosen`, and enough of `rows` that any `together` values that occur in one of `rows` occur
    together in the result.

    The next row is the one that adds most combinations; among equals, the one whose values were
    used least; among these, the first.

    allpairspy is not used: where combinations are excluded, it ends before all pairs are covered.
    """
    brings = {row: set(itertools.combinations(enumerate(row), together)) for row in rows}
    taken: set[Row] = set()
    missing = set().union(*brings.values())
    uses: Counter[tuple[int, int]] = Counter()

    def take(row: Row) -> None:
        taken.add(row)
        uses.update(enumerate(row))
        missing.difference_update(brings[row])

    for row in chosen:
        take(row)
    left = [row for row in rows if row not in taken]
    while missing:
        gains = {row: gain for row in left if (gain := len(brings[row] & missing))}
        used = {row: sum(uses[value] for value in enumerate(row)) for row in gains}
        take(max(gains, key=lambda row: (gains[row], -used[row])))
        left = list(gains)
    return taken


def _parameter(value: Any) -> Any:
    """A value as `pytest.param` with an id."""
    if isinstance(value, type(pytest.param())):
        name = "-".join(map(_name, value.values)) if value.id is None else value.id
        return pytest.param(*value.values, id=name, marks=value.marks)
    return pytest.param(value, id=_name(value))


def _name(value: Any) -> str:
    name = getattr(value, "name", None) or getattr(value, "__name__", None) or str(value)
    return str(name).removeprefix("torch.")


def _joined(parameters: Sequence[Any]) -> Any:
    values = itertools.chain.from_iterable(parameter.values for parameter in parameters)
    marks = itertools.chain.from_iterable(parameter.marks for parameter in parameters)
    name = "-".join(parameter.id for parameter in parameters)
    return pytest.param(*values, id=name, marks=list(marks))


def _marked(parameter: Any) -> Any:
    marks = [*parameter.marks, pytest.mark.product]
    return pytest.param(*parameter.values, id=parameter.id, marks=marks)
