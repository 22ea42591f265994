"""Edits of the networks' attributes, children and weights.

The attributes are those that drawing an eager picture reads, see `edits.recorded`.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from edits.recorded import PLAIN, all_reads, networks, of_class, prepare
from edits.table import Edit, add, altered, edit, edits
from edits.twins import Twin, original

OTHERS: dict[str, list[Any]] = {
    "padding_mode": ["circular", "reflect", "replicate"],
    "norm_type": ["layer_norm_i2vgen", "ada_norm"],
    "time_embedding_norm": ["scale_shift", "group"],
    "_chunk_size": [1, 2],
    "num_upsamplers": [0, 4],
    "padding": ["same", 1],
}
"""Values to set by attribute; for other attributes `other_values` derives them."""


def other_values(name: str, value: Any) -> list[Any]:
    """Values of an attribute that diffusers accepts, without the present one."""
    if name in OTHERS:
        return [other for other in OTHERS[name] if other != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value // 2, value * 2] if value > 1 else [value + 1]
    if isinstance(value, float):
        return [value * 1.5 + 0.05, 2]
    return []


def changeable(pipe: Any, own: type, name: str) -> list[tuple[nn.Module, list[Any]]]:
    """Modules of a class, each with the values that the attribute can be set to."""
    found = []
    for module in of_class(pipe, own):
        value = vars(module).get(name, ...)
        if isinstance(value, PLAIN) and other_values(name, value):
            found.append((module, other_values(name, value)))
    return found


def set_attribute(own: type, name: str) -> Callable[[Twin], None]:
    def apply(twin: Twin) -> None:
        prepare(twin, own, name)
        module, values = twin.dice.choice(changeable(twin.pipe, own, name))
        setattr(module, name, twin.dice.choice(values))

    return apply


for _own, _name in sorted(all_reads().values, key=str):
    if changeable(original(), _own, _name):
        add(Edit("attribute", f"{_own.__name__}.{_name}", set_attribute(_own, _name)))


@edit("attribute", "dilation and padding")
def same_size(twin: Twin) -> None:
    convs = [m for m in of_class(twin.pipe, nn.Conv2d) if m.kernel_size == (3, 3)]
    conv: Any = twin.dice.choice(convs)
    conv.dilation = conv.padding = (2, 2)


@edit("attribute", "dropout in training")
def in_training(twin: Twin) -> None:
    drop: Any = twin.dice.choice(of_class(twin.pipe, nn.Dropout))
    drop.p = 0.5
    drop.train()


def replaced(own: type, make: Callable[[Any], nn.Module]) -> Callable[[Twin], None]:
    """Replace a random module of a class."""

    def apply(twin: Twin) -> None:
        names = [name for name, m in networks(twin.pipe).items() if isinstance(m, own)]
        *path, last = twin.dice.choice(names).split(".")
        holder = functools.reduce(getattr, path, twin.pipe)
        setattr(holder, last, make(getattr(holder, last)))

    return apply


class Halved(nn.Module):
    """A user's module that replaces another."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x * 0.5


class Wrapped(nn.Module):
    """A user's module that wraps one of the network's modules."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return altered(self.inner(*args, **kwargs))


@torch.no_grad()
def scaled(module: Any) -> nn.Module:
    """A copy with scaled parameters."""
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        parameter.mul_(1.2)
    return other


def given(own: type, name: str, make: Callable[[Any], Any]) -> Callable[[Twin], None]:
    """Add a part to a random module of a class, or remove one."""

    def apply(twin: Twin) -> None:
        found = [(module, make(module)) for module in of_class(twin.pipe, own)]
        changed = [pair for pair in found if getattr(pair[0], name, None) is not pair[1]]
        module, part = twin.dice.choice(changed)
        setattr(module, name, part)

    return apply


REPLACED: dict[str, tuple[type, Callable[[Any], nn.Module]]] = {
    "dropout halves": (nn.Dropout, lambda m: Halved()),
    "dropout of another p": (nn.Dropout, lambda m: nn.Dropout(0.3).eval()),
    "dropout in training mode": (nn.Dropout, lambda m: nn.Dropout(0.3).train()),
    "SiLU is GELU": (nn.SiLU, lambda m: nn.GELU()),
    "SiLU is Identity": (nn.SiLU, lambda m: nn.Identity()),
    "SiLU is another SiLU": (nn.SiLU, lambda m: nn.SiLU()),
    "Linear of other values": (nn.Linear, scaled),
    "Linear and halving": (nn.Linear, lambda m: nn.Sequential(m, Halved())),
    "convolution of other values": (nn.Conv2d, scaled),
    "convolution and halving": (nn.Conv2d, lambda m: nn.Sequential(m, Halved())),
    "GroupNorm without affine": (
        nn.GroupNorm,
        lambda m: nn.GroupNorm(m.num_groups, m.num_channels, m.eps, affine=False),
    ),
    "LayerNorm without affine": (
        nn.LayerNorm,
        lambda m: nn.LayerNorm(m.normalized_shape, m.eps, elementwise_affine=False),
    ),
    "LayerNorm is RMSNorm": (nn.LayerNorm, lambda m: nn.RMSNorm(m.normalized_shape, eps=1e-5)),
}
"""By name: the class whose module is replaced, and what replaces it."""

GIVEN: dict[str, tuple[type, str, Callable[[Any], Any]]] = {
    "an extra child": (nn.Module, "extra", lambda m: nn.Linear(2, 2)),
    "norm of queries": (Attention, "norm_q", lambda m: nn.LayerNorm(width(m))),
    "norm of keys": (Attention, "norm_k", lambda m: nn.RMSNorm(width(m))),
    "group norm": (Attention, "group_norm", lambda m: nn.GroupNorm(4, m.to_q.in_features)),
    "norm of text": (Attention, "norm_cross", lambda m: nn.LayerNorm(m.to_k.in_features)),
    "activation after": (TimestepEmbedding, "post_act", lambda m: nn.Tanh()),
    "time activation": (UNet2DConditionModel, "time_embed_act", lambda m: nn.Tanh()),
    "output activation": (UNet2DConditionModel, "conv_act", lambda m: nn.Tanh()),
    "no middle block": (UNet2DConditionModel, "mid_block", lambda m: None),
    "no norm at the end": (UNet2DConditionModel, "conv_norm_out", lambda m: None),
    "no bias": (nn.Linear, "bias", lambda m: None),
    "no affine": (nn.LayerNorm, "weight", lambda m: None),
    "no shortcut": (ResnetBlock2D, "conv_shortcut", lambda m: None),
    "another weight": (nn.Linear, "weight", lambda m: nn.Parameter(m.weight.detach() * 1.2)),
    "tied weights": (Attention, "to_k", lambda m: tied(m.to_k, m.to_v)),
}
"""By name: the class, its attribute, and the part that the attribute is set to."""


def width(attention: Any) -> int:
    """Channels per head."""
    return attention.to_q.weight.shape[0] // attention.heads


def tied(layer: Any, other: Any) -> Any:
    """The layer, now with the other layer's weight."""
    layer.weight = other.weight
    return layer


for _name, (_own, _make) in REPLACED.items():
    add(Edit("submodule", _name, replaced(_own, _make)))
for _name, (_own, _key, _make) in GIVEN.items():
    add(Edit("submodule", _name, given(_own, _key, _make)))
for _own in all_reads().computing:
    add(Edit("submodule", f"{_own.__name__} wrapped", replaced(_own, Wrapped)))


def weights(change: Callable[[Any], Any]) -> Callable[[Twin], None]:
    """Change one random parameter of the U-Net or the VAE."""

    @torch.no_grad()
    def apply(twin: Twin) -> None:
        pipe = twin.pipe
        nets = {"unet": pipe.unet, "vae": pipe.vae}
        found = [p for net in nets.values() for p in net.parameters() if p.is_floating_point()]
        change(twin.dice.choice(found))

    return apply


def into_data(parameter: Any) -> None:
    parameter.data = parameter.data * 1.2


for _name, _change in {
    "a weight multiplied in place": lambda p: p.mul_(1.2),
    "a weight multiplied in .data": lambda p: p.data.mul_(1.2),
    "a weight's .data replaced": into_data,
    "a row of a weight": lambda p: p[:1].mul_(1.5),
    "the last value of a weight in .data": lambda p: p.data.view(p.shape)[-1:].add_(0.5),
    "a weight through numpy": lambda p: p.detach().numpy().__imul__(1.2),
    "a weight's gradient": lambda p: setattr(p, "grad", torch.ones_like(p)),
}.items():
    add(Edit("submodule", _name, weights(_change)))


edits(
    "attribute",
    {
        f"config {key}": lambda pipe, key=key, value=value: pipe.unet.register_to_config(
            **{key: value}
        )
        for key, value in {
            "center_input_sample": True,
            "encoder_hid_dim_type": "text_proj",
            "class_embeddings_concat": True,
            "sample_size": 16,
        }.items()
    },
)
edits(
    "attribute",
    {
        "VAE's scaling factor": lambda pipe: pipe.vae.register_to_config(scaling_factor=0.4),
        "VAE's shift factor": lambda pipe: pipe.vae.register_to_config(shift_factor=0.2),
        "a user's own attribute": lambda pipe: setattr(pipe.unet.conv_in, "note", 5),
    },
)
