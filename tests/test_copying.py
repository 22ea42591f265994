"""The faster deep copies of copying.py equal those of Python's `copy`."""

import copy
from collections import OrderedDict

import torch
from torch import nn


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
    state = copy.deepcopy(nn.Linear(2, 2).state_dict())
    assert state._metadata == nn.Linear(2, 2).state_dict()._metadata


class Told(nn.Linear):
    """A module that says how it is copied."""

    def __deepcopy__(self, memo):
        return "told"


def test_modules_are_copied_as_by_python():
    conv = nn.Conv2d(2, 2, 1)
    net = nn.Sequential(conv, nn.BatchNorm1d(2), Told(2, 2), conv)
    net.own, net.sizes, net.tensor = net, ((1, 2), [3]), torch.ones(2)
    conv.bias.requires_grad_(False)
    net.tied = conv.weight
    net[1].register_forward_hook(len)
    net[1].__getstate__ = lambda: {"training": "state"}  # as a compiled network has
    copied, weight = copy.deepcopy((net, conv.weight))
    assert [*vars(copied)] == [*vars(net)]
    assert type(copied[0]) is nn.Conv2d
    assert copied.own is copied is not net
    assert copied[0] is copied[3] is not conv
    assert copied.tied is copied[0].weight is weight is not conv.weight
    assert torch.equal(weight, conv.weight)
    assert weight.data_ptr() != conv.weight.data_ptr()
    assert [p.requires_grad for p in copied[0].parameters()] == [True, False]
    assert vars(copied[1])["training"] == "state"
    assert copied[2] == "told"
    assert copied.sizes == net.sizes
    assert copied.sizes[1] is not net.sizes[1]
    assert torch.equal(copied.tensor, net.tensor)
    assert copied.tensor is not net.tensor
    assert copied[0]._forward_hooks == {}
    assert copied[0]._forward_hooks is not conv._forward_hooks
    net.compile(backend="eager")
    assert copy.deepcopy([net])[0]._compiled_call_impl is None
