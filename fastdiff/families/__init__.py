"""What fastdiff knows about each class of network: one module per class, found by name.

A recipe names the family of each network in a pipeline. To add a network, add a file in models/, a
file with a `FAMILY` here, and the recipes that name it.
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
from fastdiff.models.checks import channel_axis
from fastdiff.models.watch import class_name
from fastdiff.recipes import RECIPES
from fastdiff.runtime.planned import Run, guided_steps, step

Taken = dict[str, tuple[nn.Module, "Kind"]]
"""By dotted name: a module that fastdiff runs, and how."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a picture whose kernels are planned on tensors without memory."""

    side: int
    """The latents' height and width."""
    factor: int
    """Pixels per latent in each direction."""
    guided: bool = True
    """Whether the picture uses classifier-free guidance."""
    upcast: bool = False
    """Whether diffusers casts a float16 autoencoder to float32 to decode."""


@dataclass(frozen=True)
class Kind:
    """How fastdiff runs one class of module."""

    borrow: Callable[..., Any]
    """(module, loan) -> network on borrowed weights; raises Unsupported."""
    call: Callable[..., Any]
    """(network, *the module's own arguments) -> the module's own output; raises Unsupported."""
    planned: Callable[[Any, Sizes], list[Run]]
    """(network, sizes of a picture) -> the functions that the picture runs on a GPU."""
    runner: str = "fastdiff"
    """The backend, as the report names it."""
    frozen: bool = False
    """Whether the network is outdated once the module's weights are edited in place."""
    exact: Callable[..., Any] | None = None
    """Like `borrow`, for the float32 copy after an overflow; None: `borrow` itself."""
    guarded: bool = False
    """Whether to check each output for overflow; the wait pays off for a part run once a
    picture."""
    tactics: bool = True
    """Whether its convolutions use plans that cuDNN searched."""
    cuts: bool | None = None
    """Whether large pictures are computed in strips; None if it cannot. If it can, `borrow` takes
    `exact=True`."""
    offload: bool = False
    """Whether weights that only `hoist` reads wait in host memory."""
    notes: Callable[[Any], list[str]] = lambda network: []
    """(network) -> notes for the report on how it runs."""
    scale: Callable[..., float] = lambda *args, **kwargs: 1.0
    """(*the module's own arguments) -> the factor by which this call scales LoRA adapters."""


@dataclass(frozen=True)
class Denoised:
    """What denoising loops and exports need to know about a network, besides its kind."""

    conditions: Callable[..., Any]
    """The named tuple of the network's conditions; fields as in diffusers' `forward`."""
    example: Callable[[Any, int, int], Any]
    """(network, texts, tokens per text) -> conditions of a picture; the values do not matter."""
    channels: Callable[[Any], int]
    """(network) -> channels of its latents."""
    part: Callable[..., Part]
    """(folder, module, dtype, tokens of CLIP's text, shape of the timestep) -> its exported file;
    raises UserError."""
    unexported: Callable[[Any], None]
    """(network) -> None; raises Unsupported if the network has parts that no file can hold."""
    multiple: Callable[[Any], int]
    """(module) -> the number that must divide the latents' height and width in a file."""
    tokens: int = 77
    """Tokens per text in published pipelines."""
    most: Callable[[Any], int | None] = lambda module: None
    """(module) -> the largest height and width of its latents; None: unlimited."""
    constant_channels: Callable[[Any], int] = lambda network: 0
    """(network) -> channels of its input that follow the latents' and stay the same in all steps,
    one of its conditions; see `Plan`."""
    beside: tuple[str, ...] = ("controlnet", "adapter")
    """Components of a pipeline that give it residuals, which an exported file does not take."""
    shape: Callable[[Any, int], tuple[int, ...]] | None = None
    """(network, side) -> the shape of a picture's latents. None: [1, C, side, side]."""
    placed: Callable[[Any, Tensor], Any] = lambda given, latents: given
    """(conditions, latents) -> the conditions with the positions of the latents' tokens."""
    guided: bool = True
    """Whether published pipelines use classifier-free guidance."""
    for_file: Callable[[Any, Any], Any] = lambda module, given: given
    """(module, conditions) -> a named tuple with the tensors that a file takes; raises
    Unsupported."""
    float32: bool = False
    """Whether loops keep latents in float32 for a network of any dtype."""

    def picture(
        self, network: Any, side: int, texts: int, tokens: int | None = None
    ) -> tuple[Any, Tensor]:
        """The conditions and the latents of a picture, on the meta device, for a network without
        memory. texts: 2 with guidance; tokens: per text, default `self.tokens`."""
        own, constant = self.channels(network), self.constant_channels(network)
        shape: tuple[int, ...] = (1, own + constant, side, side)
        if self.shape is not None:
            shape = self.shape(network, side)
        channels = torch.empty(shape, dtype=network.dtype, device="meta")
        given = self.example(network, texts, tokens or self.tokens)
        axis = channel_axis(channels)
        latents, others = channels.tensor_split((own,), axis)
        if constant:
            given = given._replace(constant_channels=others)
        return self.placed(given, latents), latents.contiguous()

    def loop(self, network: Any, sizes: Sizes) -> list[Run]:
        """The functions that a picture's loop runs, for any scheduler; `network`: see `picture`."""
        texts = 2 if sizes.guided and self.guided else 1
        given, latents = self.picture(network, sizes.side, texts)
        return [step(network, given, latents), *guided_steps(network, given, latents, texts)]


@dataclass(frozen=True)
class Family:
    """A class of networks, with everything that other packages need to know about it."""

    models: tuple[str, ...]
    """Classes that can be compiled on their own; a class outside of diffusers is given by its path,
    "package.module.Class"."""
    taken: Callable[[str, Any], Taken]
    """(component's name, component) -> its modules that fastdiff runs; {} for an unknown class."""
    left: Mapping[str, str] = field(default_factory=dict)
    """Attributes of the component that stay with diffusers on purpose, and why."""
    asked: Callable[[Any], dict[str, str]] = lambda component: {}
    """(component) -> settings of diffusers that change how its parts are called: rows of the
    report, by name."""
    denoised: Denoised | None = None
    """None if no loop repeats it."""
    parts: Callable[..., tuple[Part, ...]] | None = None
    """(component, dtype, side of its latents, upcasts) -> its exported files, for parts run once a
    picture."""


@cache
def family(name: str) -> Family:
    """The `FAMILY` of `fastdiff.families.<name>`."""
    found: Family = import_module(f"fastdiff.families.{name}").FAMILY
    return found


def families() -> dict[str, Family]:
    """All families that recipes name, by name, in their order."""
    names = (name for recipe in RECIPES.values() for name in recipe.networks.values())
    return {name: family(name) for name in dict.fromkeys(names)}


def plain(module: Any) -> Any:
    """The module itself, if it is wrapped by `torch.compile(module)`."""
    while type(module).__name__ == "OptimizedModule":  # isinstance would see the wrapped module
        module = module._orig_mod
    return module


def of_model(model: Any, *names: str) -> bool:
    """Whether a model's class, or one of its base classes, is among `names`."""
    return not _classes(model).isdisjoint(names)


def _classes(model: Any) -> set[str]:
    return {class_name(cls) for cls in type(plain(model)).__mro__}


def named(model: Any) -> tuple[str, Family] | None:
    """A bare model's component name in a pipeline and its family; None if it is unknown."""
    classes = _classes(model)  # once for a hundred rows: compile asks this twenty times
    for recipe in RECIPES.values():
        for component, name in recipe.networks.items():
            if not classes.isdisjoint(family(name).models):
                return component, family(name)
    return None


def settings(root: nn.Module) -> list[tuple[str, str, Any]]:
    """The numbers and strings that, besides its weights, define what a component computes: all that
    the runtime reads, as (path, attribute, value).

    Empty for a component that fastdiff does not compute.
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
    """A tensor of `like`'s dtype on its device, not initialised."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)
