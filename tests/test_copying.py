"""The faster deep copies of copying.py equal those of Python's `copy`."""

import copy
from collections import OrderedDict

import torch


def test_dicts_and_sets_are_copied_as_by_python():
    shared = [1]
    first = OrderedDict(b=shared, a={(1, 2)}, empty=OrderedDict(), none=set())
    first["own"] = first
    second = OrderedDict(a=shared)
    second._metadata = {"version": shared}  # as a state_dict has
    copied, other = copy.deepcopy([first, second])
    assert [*copied] == [*first]
    assert copied["own"] is copied is not first
    assert copied["a"] == {(1, 2)}
    assert copied["a"] is not first["a"]
    assert copied["empty"] == OrderedDict()
    assert type(copied["empty"]) is type(other) is OrderedDict
    assert copied["empty"] is not first["empty"]
    assert copied["b"] is other["a"] is other._metadata["version"] is not shared
    plain = {(1, 2): shared, "name": str, "none": {}, 3: first}
    plain |= {"own": plain, "same": plain["none"]}
    got, again = copy.deepcopy((plain, shared))
    assert [*got] == [*plain]
    assert got["own"] is got is not plain
    assert got[1, 2] is got[3]["b"] is again is not shared
    assert got["name"] is str
    assert got["none"] == {}
    assert got["same"] is got["none"]
    assert got["none"] is not plain["none"]
    state = copy.deepcopy(torch.nn.Linear(2, 2).state_dict())
    assert state._metadata == torch.nn.Linear(2, 2).state_dict()._metadata
