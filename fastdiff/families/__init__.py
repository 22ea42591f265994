"""What fastdiff knows of each class of network: a module for each, found by its name.

A recipe names the family of every network of a pipeline. A new network is a file in models/, one
here with a `FAMILY`, and the recipes that name it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.families.part import Part
from fastdiff.models.borrow import Loan, Unsupported
from fastdiff.models.watch import class_name
from fastdiff.recipes import RECIPES
from fastdiff.runtime.planned import Run, guided_steps, step

Taken = dict[str, tuple[nn.Module, "Kind"]]
"""By dotted name: a module that is taken over, and how."""


@dataclass(frozen=True)
class Sizes:
    """Of a picture whose kernels are planned, on tensors without memory."""

    side: int
    """Of the latents."""
    factor: int
    """Pixels of a latent's side."""
    guided: bool = True
    """Whether by classifier-free guidance."""
    upcast: bool = False
    """Whether diffusers turns a float16 autoencoder into float32 to draw with it."""


@dataclass(frozen=True)
class Kind:
    """How one class of module is taken over."""

    borrow: Callable[..., Any]
    """(module, loan) -> network on borrowed weights; raises Unsupported."""
    call: Callable[..., Any]
    """(network, *the module's own arguments) -> the module's own output; raises Unsupported."""
    planned: Callable[[Any, Sizes], list[Run]]
    """(network, sizes of a picture) -> what the picture asks of the network on a GPU."""
    runner: str = "fastdiff"
    """Who computes, as the report names it."""
    frozen: bool = False
    """Whether the network goes stale when the module's weights are edited in place."""
    exact: Callable[..., Any] | None = None
    """What borrows a float32 copy after an overflow; `borrow` if None."""
    guarded: bool = False
    """Whether each output is looked at for overflow: worth a wait for what runs once an image."""
    tactics: bool = True
    """Whether its convolutions run by plans that cuDNN searched."""
    cuts: bool | None = None
    """Whether large pictures are computed in strips; None: it knows no strips. What does has a
    `borrow` that takes `exact=True`."""
    notes: Callable[[Any], list[str]] = lambda network: []
    """(network) -> what a report should say of how it runs."""
    scale: Callable[..., float] = lambda *args, **kwargs: 1.0
    """(*the module's own arguments) -> what this call multiplies the LoRA adapters by."""


@dataclass(frozen=True)
class Denoised:
    """What a denoising loop and an exported file ask of a network beside its kind."""

    conditions: Callable[..., Any]
    """The named tuple of what the network is told: fields by the names of diffusers' `forward`."""
    example: Callable[[Any, int, int], Any]
    """(network, texts, tokens of each) -> conditions of a picture, of any values."""
    channels: Callable[[Any], int]
    """(network) -> channels of its latents."""
    part: Callable[..., Part]
    """(folder, module, dtype, tokens of CLIP's text, shape of the timestep) -> the file of its own;
    raises UserError."""
    unexported: Callable[[Any], None]
    """(network) -> None; raises Unsupported where it has what no file holds."""
    multiple: Callable[[Any], int]
    """(module) -> of which the latents' height and width must be in a file."""
    tokens: int = 77
    """Of a text as published pipelines encode it."""
    most: Callable[[Any], int | None] = lambda module: None
    """(module) -> the greatest height and width of latents that it takes; None: any."""
    beside: tuple[str, ...] = ("controlnet", "adapter")
    """Components of a pipeline that give it residuals, which no file takes."""

    def picture(
        self, network: Any, side: int, texts: int, tokens: int | None = None
    ) -> tuple[Any, Tensor]:
        """The conditions and the latents [1, C, side, side] of a picture, on the meta device, for a
        network without memory. texts: 2 with guidance; tokens: of each, if not `self.tokens`."""
        shape = (1, self.channels(network), side, side)
        latents = torch.empty(shape, dtype=network.dtype, device="meta")
        return self.example(network, texts, tokens or self.tokens), latents

    def loop(self, network: Any, sizes: Sizes) -> list[Run]:
        """What a picture's loop asks of a GPU, by any scheduler; `network` as of `picture`."""
        texts = 2 if sizes.guided else 1
        given, latents = self.picture(network, sizes.side, texts)
        return [step(network, given, latents), *guided_steps(network, given, latents, texts)]


@dataclass(frozen=True)
class Family:
    """A class of networks, and all that is asked about it elsewhere."""

    models: tuple[str, ...]
    """Classes that can be compiled by themselves; one outside of diffusers has its path:
    "package.module.Class"."""
    taken: Callable[[str, Any], Taken]
    """(component's name, component) -> what of it is taken over; nothing of a foreign kind."""
    left: Mapping[str, str] = field(default_factory=dict)
    """Attributes of the component that stay diffusers' on purpose, and why."""
    asked: Callable[[Any], dict[str, str]] = lambda component: {}
    """(component) -> what it was told by diffusers' own methods that changes how its parts are
    called, by a name for it: rows of the report."""
    denoised: Denoised | None = None
    """None where no loop repeats it."""
    parts: Callable[..., tuple[Part, ...]] | None = None
    """(component, dtype, side of its latents, upcasts) -> the files of what runs once an image."""


@cache
def family(name: str) -> Family:
    """The `FAMILY` of `fastdiff.families.<name>`."""
    found: Family = import_module(f"fastdiff.families.{name}").FAMILY
    return found


def families() -> dict[str, Family]:
    """All that recipes name, by name, in their order."""
    names = (name for recipe in RECIPES.values() for name in recipe.networks.values())
    return {name: family(name) for name in dict.fromkeys(names)}


def plain(module: Any) -> Any:
    """The module itself where `torch.compile(module)` stands for it."""
    while type(module).__name__ == "OptimizedModule":  # isinstance asks the module within
        module = module._orig_mod
    return module


def of_model(model: Any, *names: str) -> bool:
    """Whether a model is of one of the classes `names`, or of a class made from one."""
    return any(class_name(cls) in names for cls in type(plain(model)).__mro__)


def named(model: Any) -> tuple[str, Family] | None:
    """The name that a bare model has in a pipeline and its family; None where it has none."""
    for recipe in RECIPES.values():
        for component, name in recipe.networks.items():
            if of_model(model, *family(name).models):
                return component, family(name)
    return None


def settings(root: nn.Module) -> list[tuple[str, str, Any]]:
    """The numbers and words that say, beside its weights, what a component computes: all that the
    runtime reads of it, as (path, attribute, value).

    Of a component that it does not compute, nothing.
    """
    known = named(root)
    taken = {} if known is None else known[1].taken("", root)
    found: list[tuple[str, str, Any]] = []
    for name, (module, kind) in taken.items():
        try:
            loan = Loan(module, rehearsal=True)
            kind.borrow(module, loan)
        except Unsupported:
            continue
        found += ((f"{name}.{path}".strip("."), key, v) for path, key, v in loan.settings())
    return found


def empty(like: Tensor, *shape: int) -> Tensor:
    """A tensor of `like`'s dtype on its device, of any values."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)
