"""What tests of random calls share: adapters, callbacks, noise."""

import functools
from unittest.mock import patch

import torch
from peft import LoraConfig


def add_adapters(net, targets):
    """LoRA adapters "one" and "two"."""
    for name, rank in (("one", 4), ("two", 16)):
        config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
        net.add_adapter(config, name)


_RANDN, _SINGLE = torch.randn, torch.float32


def single_draws(*args, **kwargs):
    """torch.randn drawn in float32 and then cast: the same numbers in every dtype."""
    wanted = kwargs.get("dtype") or torch.get_default_dtype()
    return _RANDN(*args, **{**kwargs, "dtype": _SINGLE}).to(wanted)


def exact_steps(scheduler):
    """Let the scheduler of a float64 pipeline compute its steps in float64: flow-matching ones cast
    to float32, so without this their pictures are no truth."""
    step = scheduler.step

    @functools.wraps(step)
    def exact(*args, **kwargs):
        with patch.object(torch, "float32", torch.float64):
            return step(*args, **kwargs)

    scheduler.step = exact


def adapt(net, adapters):
    """Switch a network's LoRA adapters on, each with its weight, and the others off."""
    net.enable_adapters() if adapters else net.disable_adapters()
    if adapters:
        net.set_adapters(list(adapters), weights=list(adapters.values()))


def callback_of(call):
    """The keyword arguments that give a pipeline the callback of a call; {} if it has none."""
    if not call["callback"]:
        return {}
    factor = 1.0 if call["callback"] == "looks" else 0.9
    return {"callback_on_step_end": lambda _, i, t, kwargs: {"latents": kwargs["latents"] * factor}}
