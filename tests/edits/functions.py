"""Edits of classes, functions and hooks, among them every method that an eager picture calls."""

import contextlib
import functools
import random
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import diffusers.models.embeddings
import diffusers.models.unets.unet_2d_condition
import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion as pipeline_module
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations

from edits.recorded import all_reads, networks, of_class, prepare
from edits.table import Edit, add, altered, edit, edits
from edits.twins import Twin

CALLED = sorted(all_reads().methods, key=lambda pair: (pair[0].__name__, pair[1]))


def around(own: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its result is altered."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        return altered(own(*args, **kwargs))

    return changed


def subclass(own: Any, name: str) -> Any:
    """A user's subclass of the same name that overrides one method."""
    return type(own.__name__, (own,), {name: around(getattr(own, name))})


def another_class(own: type, name: str) -> Callable[[Twin], None]:
    def apply(twin: Twin) -> None:
        prepare(twin, own, name)
        module = twin.dice.choice(of_class(twin.pipe, own))
        module.__class__ = subclass(type(module), name)

    return apply


def another_method(own: type, name: str) -> Callable[[Twin], None]:
    def apply(twin: Twin) -> None:
        prepare(twin, own, name)
        module = twin.dice.choice(of_class(twin.pipe, own))
        setattr(module, name, around(getattr(module, name)))

    return apply


def patched(owner: Any, name: str) -> Callable[[random.Random], AbstractContextManager[Any]]:
    return lambda dice: mock.patch.object(owner, name, around(getattr(owner, name)))


for _own, _name in CALLED:
    _id = f"{_own.__name__}.{_name}"
    add(Edit("class", _id, another_class(_own, _name)))
    add(Edit("function", f"{_id} of one", another_method(_own, _name)))
    _prepare = functools.partial(prepare, own=_own, name=_name)
    add(Edit("function", f"{_id} of all", _prepare, patched(_own, _name)))

PATCHES = {
    **{
        f"F.{name}": (F, name)
        for name in (
            *("scaled_dot_product_attention", "silu", "gelu", "linear", "conv2d"),
            *("group_norm", "layer_norm", "interpolate", "softmax"),
        )
    },
    "get_timestep_embedding": (diffusers.models.embeddings, "get_timestep_embedding"),
    "AttnProcessor2_0.__call__": (AttnProcessor2_0, "__call__"),
    "AttnProcessor.__call__": (AttnProcessor, "__call__"),
    "nn.Module.__call__": (nn.Module, "__call__"),
    "AutoencoderKL.decode": (AutoencoderKL, "decode"),
    "AutoencoderKL._decode": (AutoencoderKL, "_decode"),
    "prepare_latents": (StableDiffusionPipeline, "prepare_latents"),
    "encode_prompt": (StableDiffusionPipeline, "encode_prompt"),
    "rescale_noise_cfg": (pipeline_module, "rescale_noise_cfg"),
}
"""Functions of torch and diffusers that users replace for all pipelines."""
for _name, (_owner, _key) in PATCHES.items():
    add(Edit("function", f"{_name} patched", everywhere=patched(_owner, _key)))


def pipeline_class(**members: Any) -> Callable[[Twin], None]:
    """Give the pipeline a user's class with these members."""

    def apply(twin: Twin) -> None:
        own = type(twin.pipe)
        twin.pipe.__class__ = type(own.__name__, (own,), members)

    return apply


for _name, _members in {
    "pipeline": {},
    "pipeline.guidance_scale": {"guidance_scale": property(lambda self: 1.7)},
    "pipeline.do_classifier_free_guidance": {
        "do_classifier_free_guidance": property(lambda self: False)
    },
    "pipeline.prepare_latents": {
        "prepare_latents": around(StableDiffusionPipeline.prepare_latents)
    },
    "pipeline.interrupt": {"interrupt": property(lambda self: True)},
}.items():
    add(Edit("class", _name, pipeline_class(**_members)))


@edit("class", "AutoencoderKL.decode")
def own_vae(twin: Twin) -> None:
    twin.pipe.vae.__class__ = subclass(type(twin.pipe.vae), "decode")


@edit("class", "weight_norm")
def weight_norm(twin: Twin) -> None:
    parametrizations.weight_norm(twin.dice.choice(of_class(twin.pipe, nn.Linear)))


@edit("class", "old weight_norm")
def old_weight_norm(twin: Twin) -> None:
    torch.nn.utils.weight_norm(twin.dice.choice(of_class(twin.pipe, nn.Conv2d)))


@edit("function", "an unbound call")
def unbound(twin: Twin) -> None:
    twin.entry = lambda pipe, **given: StableDiffusionPipeline.__call__(pipe, **given)


@edit("function", "a call in no_grad that is not diffusers'")
def unwrapped(twin: Twin) -> None:
    twin.entry = lambda pipe, **given: type(pipe).__call__.__wrapped__(pipe, **given)


edits(
    "function",
    {
        "pipe.prepare_latents": lambda pipe: setattr(
            pipe, "prepare_latents", around(pipe.prepare_latents)
        ),
        "unet.forward bound anew": lambda pipe: setattr(
            pipe.unet, "forward", types.MethodType(type(pipe.unet).forward, pipe.unet)
        ),
        "vae.decode": lambda pipe: setattr(pipe.vae, "decode", around(pipe.vae.decode)),
    },
)


# Hooks


def anywhere(twin: Twin) -> Any:
    """A random module whose forward is called."""
    classes = all_reads().computing
    found = [m for m in networks(twin.pipe).values() if isinstance(m, classes)]
    return twin.dice.choice(found)


class Damping(ModelHook):
    """A hook of accelerate that alters the output."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return altered(output)


def damping(module: Any, args: Any, output: Any) -> Any:
    return altered(output)


def looking(twin: Twin) -> Callable[..., None]:
    return lambda module, args, output: twin.seen.append(type(output).__name__)


def before(module: Any, args: Any, kwargs: Any) -> Any:
    return (tuple(map(altered, args[:1])) + args[1:], kwargs)


HOOKS: dict[str, Callable[[Twin], Any]] = {
    "forward": lambda twin: anywhere(twin).register_forward_hook(damping),
    "forward, looking": lambda twin: anywhere(twin).register_forward_hook(looking(twin)),
    "forward, first": lambda twin: anywhere(twin).register_forward_hook(damping, prepend=True),
    "forward, always": lambda twin: anywhere(twin).register_forward_hook(damping, always_call=True),
    "before": lambda twin: anywhere(twin).register_forward_pre_hook(before, with_kwargs=True),
    "U-Net": lambda twin: twin.pipe.unet.register_forward_hook(damping),
    "U-Net, before": lambda twin: twin.pipe.unet.register_forward_pre_hook(
        before, with_kwargs=True
    ),
    "decoder": lambda twin: twin.pipe.vae.decoder.register_forward_hook(damping),
    "VAE": lambda twin: twin.pipe.vae.register_forward_hook(damping),
    "backward": lambda twin: anywhere(twin).register_full_backward_hook(lambda *given: None),
    "state_dict": lambda twin: anywhere(twin).register_state_dict_post_hook(lambda *given: None),
    "accelerate": lambda twin: add_hook_to_module(anywhere(twin), Damping()),
    "accelerate, U-Net": lambda twin: add_hook_to_module(twin.pipe.unet, Damping()),
    "accelerate, added and removed": lambda twin: remove_hook_from_module(
        add_hook_to_module(anywhere(twin), Damping())
    ),
    "accelerate, offloaded": lambda twin: cpu_offload(twin.pipe.unet, torch.device("cpu")),
    "accelerate, VAE offloaded": lambda twin: cpu_offload(twin.pipe.vae, torch.device("cpu")),
    "accelerate, all removed": lambda twin: remove_hook_from_module(twin.pipe.unet, recurse=True),
    "added and removed": lambda twin: anywhere(twin).register_forward_hook(damping).remove(),
}
for _name, _hook in HOOKS.items():
    add(Edit("hook", _name, _hook))


@contextlib.contextmanager
def handled(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def damps_linears(module: Any, args: Any, output: Any) -> Any:
    return altered(output) if type(module) is nn.Linear else None


GLOBAL_HOOKS: dict[str, Callable[[], Any]] = {
    "forward": lambda: nn_module.register_module_forward_hook(damps_linears),
    "before": lambda: nn_module.register_module_forward_pre_hook(
        lambda module, args: (args[0] * 0.9, *args[1:]) if type(module) is nn.Linear else None
    ),
    "backward": lambda: nn_module.register_module_full_backward_hook(lambda *given: None),
}
for _name, _register in GLOBAL_HOOKS.items():
    add(
        Edit(
            "hook",
            f"global {_name}",
            everywhere=lambda dice, register=_register: handled(register()),
        )
    )
