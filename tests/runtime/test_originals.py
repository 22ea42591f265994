"""Recognising what is diffusers' own code: each method of each of its schedulers is overridden and
patched in turn."""

import functools
import inspect
import sys
from types import FunctionType

import diffusers
import pytest
from diffusers import SchedulerMixin

from fastdiff.models import Unsupported, originals
from fastdiff.models.originals import original, own_helper, own_method
from fastdiff.runtime.schedulers import _ACCESS, _STEPS

ENTRIES = (*_STEPS, *_ACCESS)


def foreign(instance, entries):
    """The name of the first thing that `entries` reach and that is not diffusers' own, or None."""
    try:
        originals.check_own(instance, entries)
    except Unsupported as stranger:
        where, *_ = str(stranger).split(" is not its library's own")
        return where.rpartition(".")[2]
    return None


def classes():
    """Every scheduler that can be made without arguments."""
    found = (getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler"))
    usable = [
        cls
        for cls in found
        if isinstance(cls, type) and issubclass(cls, SchedulerMixin) and "step" in vars(cls)
    ]
    takes = (inspect.signature(cls.__init__).parameters.values() for cls in usable)
    free = [all(p.default is not p.empty or p.kind in (2, 4) for p in [*t][1:]) for t in takes]
    return [cls for cls, yes in zip(usable, free, strict=True) if yes]


def reached(cls):
    names = originals.reached([cls], ENTRIES).names
    there = {name for base in cls.__mro__[:-1] for name in vars(base)}
    return sorted(n for n in names & there if isinstance(getattr(cls, n), FunctionType | property))


def wrapped(value):
    """A replacement of `value` with its name and docstring."""

    @functools.wraps(value.fget if isinstance(value, property) else value)
    def call(*args, **kwargs):
        return value(*args, **kwargs)

    return property(call) if isinstance(value, property) else call


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_every_overridden_or_patched_method_is_recognised(cls, monkeypatch):
    assert foreign(cls(), ENTRIES) is None
    assert foreign(type("Mine", (cls,), {"preview": lambda self: None})(), ENTRIES) is None
    names = reached(cls)
    assert "step" in names
    for name in names:
        owner = next(base for base in cls.__mro__ if name in vars(base))
        value = vars(owner)[name]
        if isinstance(value, staticmethod | classmethod):
            continue
        assert original(value, owner, name)
        other = wrapped(value)
        assert not original(other, owner, name)
        mine = type(cls.__name__, (cls,), {name: other, "__module__": cls.__module__})
        instance = object.__new__(mine)
        assert foreign(instance, ENTRIES) == name
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, other)
            assert foreign(object.__new__(cls), ENTRIES) == name
        assert foreign(object.__new__(cls), ENTRIES) is None
        if not isinstance(value, property) and not name.startswith("__"):
            instance = object.__new__(cls)
            vars(instance)[name] = value.__get__(instance)
            assert foreign(instance, ENTRIES) is None
            vars(instance)[name] = value.__get__(object.__new__(cls))
            assert foreign(instance, ENTRIES) == name


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_a_helper_patched_in_its_module_is_recognised(cls, monkeypatch):
    module = sys.modules[cls.__module__]
    if "randn_tensor" not in vars(module) or "randn_tensor" not in inspect.getsource(cls):
        return
    assert own_helper(module.randn_tensor, "randn_tensor")
    for other in (wrapped(module.randn_tensor), functools.partial(module.randn_tensor)):
        with monkeypatch.context() as patch:
            patch.setattr(module, "randn_tensor", other)
            assert foreign(cls(), ENTRIES) in ("randn_tensor", None)
            if "randn_tensor" in cls.step.__code__.co_names:
                assert foreign(cls(), ENTRIES) == "randn_tensor"
    assert foreign(cls(), ENTRIES) is None


def test_a_property_in_place_of_data_is_recognised():
    """A property where diffusers keeps data, and methods that change how attributes are read, set
    or copied."""
    for name in ("alphas_cumprod", "__getattribute__", "__setattr__", "__deepcopy__"):
        mine = type("Mine", (diffusers.DDIMScheduler,), {name: property(lambda self: None)})
        assert foreign(object.__new__(mine), ENTRIES) == name


def test_functions_given_to_a_scheduler_are_recognised():
    assert foreign(diffusers.SASolverScheduler(), ENTRIES) is None
    mine = diffusers.SASolverScheduler(tau_func=lambda t: 1.0)
    assert foreign(mine, ENTRIES) == "tau_func"


def test_a_method_of_another_diffusers_class_is_recognised(monkeypatch):
    monkeypatch.setattr(diffusers.DDIMScheduler, "step", diffusers.DDPMScheduler.step)
    assert foreign(diffusers.DDIMScheduler(), ENTRIES) == "step"


def test_methods_of_pipelines(monkeypatch):
    cls = diffusers.StableDiffusionPipeline
    pipe = object.__new__(cls)
    assert own_method(pipe, "prepare_latents")
    assert original(vars(cls)["__call__"], cls, "__call__")  # under torch.no_grad
    vars(pipe)["prepare_latents"] = pipe.prepare_latents
    assert not own_method(pipe, "prepare_latents")
    monkeypatch.setattr(cls, "__call__", wrapped(cls.__call__))
    assert not original(vars(cls)["__call__"], cls, "__call__")
