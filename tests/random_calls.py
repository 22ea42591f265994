"""What tests of random calls share: adapters, callbacks, noise."""

import torch
from peft import LoraConfig


def add_adapters(net, targets):
    """LoRA adapters "one" and "two"."""
    for name, rank in (("one", 4), ("two", 16)):
        config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
        net.add_adapter(config, name)


_RANDN = torch.randn


def single_draws(*args, **kwargs):
    """torch.randn drawn in float32 and then cast: the same numbers in every dtype."""
    wanted = kwargs.get("dtype") or torch.get_default_dtype()
    return _RANDN(*args, **{**kwargs, "dtype": torch.float32}).to(wanted)


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
