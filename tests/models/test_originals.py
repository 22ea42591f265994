"""A compiled network computes what its modules' own code computes, also where a user has patched,
subclassed or overridden it."""

import copy
import functools
import types
import warnings

import pytest
import torch
from diffusers.models.attention_processor import Attention
from small import NETS
from torch import nn
from torch.nn import functional as F

import fastdiff
from fastdiff.compiler.slot import slot_of
from fastdiff.models.originals import reached


@pytest.fixture(scope="module")
def network(compiled):
    net, given, options = compiled
    return net, lambda call: whole(call(*given, **options))


def whole(out):
    """All numbers of a result, as one row."""
    if isinstance(out, tuple | list):
        return torch.cat([whole(part) for part in out])
    return out.flatten() if torch.is_tensor(out) else whole(tuple(out.values()))


def fresh(name):
    """As `network`, for a test that does not undo its changes."""
    _, net, given, options = NETS[name]()
    return fastdiff.compile(net), lambda call: whole(call(*given, **options))


def halved(forward):
    """A replacement of `forward` that returns half of every tensor."""

    @functools.wraps(forward)
    def half(*given, **options):
        out = forward(*given, **options)
        if isinstance(out, tuple):
            return tuple(map(half_of, out))
        return half_of(out)

    def half_of(value):
        if not torch.is_tensor(value):
            return value
        if value.is_floating_point() or value.is_complex():
            return value * 0.5
        return (value // 2).to(value.dtype)  # indices and masks

    return half


def check(net, run, where, slow=True):
    """Check that a call of the net gives what its modules' own code gives, and runs eagerly if
    `slow`."""
    slot = slot_of(net)
    calls = slot.fast
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = run(net)
    wanted = run(net._call_impl)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4, msg=where)
    assert (slot.fast == calls) == slow, f"{where}: {slot.refused}"


def one_of_each(net):
    """One object of every class that the network reads."""
    return {type(thing): thing for thing in slot_of(net).loan.opened.values()}


@pytest.fixture(
    scope="module", params=[pytest.param("in every network", marks=pytest.mark.product), "once"]
)
def chosen_of(request):
    """chosen_of(test, names): the names that `test` checks in a network. `make test` leaves out
    those that an earlier network had as well."""
    seen = {}

    def chosen(test, names):
        done = seen.setdefault(test, set()) if request.param == "once" else set()
        left = [name for name in names if name not in done]
        done.update(left)
        return left

    return chosen


@torch.no_grad()
def test_subclasses(network, chosen_of):
    """For every class in turn, an object gets a user's subclass, which has the class's name."""
    net, run = network
    plain = run(net)
    changed, things = 0, one_of_each(net)
    chosen = chosen_of("subclasses", things)
    for cls in chosen:
        thing = things[cls]
        entry = "__call__" if not isinstance(thing, nn.Module) else "forward"
        own = {entry: halved(getattr(cls, entry)), "__module__": "mine"}
        thing.__class__ = type(cls.__name__, (cls,), own)
        try:
            check(net, run, f"{cls.__name__} subclassed")
            changed += not torch.allclose(run(net._call_impl), plain, rtol=1e-2)
        finally:
            thing.__class__ = cls
    check(net, run, "as before", slow=False)
    assert changed > 6 or len(chosen) < len(things)


@torch.no_grad()
def test_patches(network, chosen_of):
    """Every function that the network's code reaches is patched in its class."""
    net, run = network
    classes = list(one_of_each(net))
    names = reached(classes).names
    owners = {base for cls in classes for base in cls.__mro__}
    used = [
        (owner, name)
        for owner in sorted(owners, key=lambda cls: cls.__qualname__)
        for name, function in vars(owner).items()
        if owner.__module__.partition(".")[0] in ("torch", "diffusers") and owner is not nn.Module
        if isinstance(function, types.FunctionType)
        if name in ("forward", "__call__") or (name in names and not name.startswith("__"))
    ]
    assert len(used) > 12
    for owner, name in chosen_of("patches", used):
        function = vars(owner)[name]
        setattr(owner, name, halved(function))
        try:
            check(net, run, f"{owner.__qualname__}.{name} patched")
        finally:
            setattr(owner, name, function)
    check(net, run, "as before", slow=False)


@torch.no_grad()
@pytest.mark.parametrize(
    ("namespace", "name"),
    [
        (F, "scaled_dot_product_attention"),
        (F, "silu"),
        (F, "group_norm"),
        (F, "linear"),
        (F, "interpolate"),
        (nn.Module, "__call__"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_functions_of_modules(monkeypatch, namespace, name):
    """Users replace them, for example by attention kernels of their own."""
    net, run = fresh("sd15 of LCM")
    plain = run(net)
    calls = []
    own = getattr(namespace, name)

    def spy(*given, **options):
        calls.append(name)
        return own(*given, **options)

    monkeypatch.setattr(namespace, name, spy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        torch.testing.assert_close(run(net), plain, rtol=1e-3, atol=1e-4)
    assert calls
    if name != "__call__":
        assert "not its library's own" in slot_of(net).refused
    monkeypatch.undo()
    torch.testing.assert_close(run(net), plain)
    assert slot_of(net).refused is None


@torch.no_grad()
def test_functions_of_objects(network, chosen_of):
    """A method in an object's own dict takes precedence over its class's."""
    net, run = network
    things = one_of_each(net)
    for cls in chosen_of("functions of objects", things):
        thing = things[cls]
        if not isinstance(thing, nn.Module):
            continue
        for other in (halved(thing.forward), copy.deepcopy(thing).forward):
            thing.forward = other
            check(net, run, f"{cls.__name__}'s own forward")
            del thing.forward
    check(net, run, "as before", slow=False)


@torch.no_grad()
def test_methods_that_processors_call():
    """diffusers' processors call methods of the attention that they are given."""
    net, run = fresh("upscaler, classic attention")
    run(net)
    attention = next(m for m in net.modules() if type(m) is Attention)
    own = attention.get_attention_scores
    attention.get_attention_scores = lambda *given: own(*given).flip(-1)
    check(net, run, "get_attention_scores of its own")


@torch.no_grad()
def test_removed_hooks_leave_nothing():
    """When accelerate removes a hook, it leaves the original forward in the object's dict."""
    net, run = fresh("sd15 of LCM")
    run(net)
    for module in net.modules():
        module.forward = module.forward
    check(net, run, "a forward left behind", slow=False)
