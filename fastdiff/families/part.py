"""The exported form of a network: one ONNX file, with inputs and outputs named as in Optimum."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.families.positions import Turned


@dataclass(frozen=True)
class Port:
    """One input or output: a torch dtype's name, and a shape in which named sides are free.

    An output's side may be a multiple of a free side, "8*height", or a fraction, "height//8".
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape for the free sides `sizes`."""
        return tuple(_side(side, sizes) for side in self.shape)


@dataclass(frozen=True)
class Part:
    """One ONNX file. `module` takes `inputs` by position and returns a tuple of `outputs`.

    example: the free sides at which it is traced. cases: those at which it is verified, beginning
    with its own size and full text length. most: the largest height and width it takes. unit: its
    input for a timestep of 1. packed: rows and columns of the latents that are one token of its
    input, if it is packed. guided: whether published pipelines give it two texts for a picture.
    own: computes the same by the network's own call, if `module` does not call it; the file is
    compared with this. told: makes its inputs, by name, from the arguments of the network's own
    call. returned: makes what that call returns of the file's prediction.
    Free sides are latents of a denoising network or VAE decoder, pixels of a VAE encoder, tokens of
    a text encoder. A denoising network's first input is the latents, its second the timestep; the
    others have the names of its conditions.
    """

    folder: str
    source: nn.Module
    """The pipeline's own module, of which `module` may be a copy in another dtype."""
    module: nn.Module
    dtype: torch.dtype
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    example: dict[str, int]
    cases: tuple[dict[str, int], ...]
    most: int | None = None
    unit: float = 1.0
    packed: int = 0
    guided: bool = True
    own: nn.Module | None = None
    told: Callable[[dict[str, Any]], dict[str, Any]] = dict
    returned: Callable[[Tensor], Any] = lambda sample: sample

    @property
    def net(self) -> Any:  # diffusers' or transformers' own
        return self.module.net

    @property
    def file(self) -> str:
        return f"{self.folder}/model.onnx"

    def sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """The free sides, taken from the inputs' shapes by name."""
        return {
            side: size
            for port in self.inputs
            for side, size in zip(port.shape, shapes.get(port.name, ()), strict=False)
            if isinstance(side, str)
        }


class Frequencies(nn.Module):
    """diffusers' Timesteps [B] -> [B, C] with its frequencies as a constant, bit for bit torch's.

    If a runtime's exp differs by one rounding, the angle at timestep 999 is off by 1e-4 rad.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        half = source.num_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32)
        table = torch.exp(exponent / (half - source.downscale_freq_shift))
        self.cosine_first, self.scale = source.flip_sin_to_cos, source.scale
        self.register_buffer("table", table)

    def forward(self, timesteps: Tensor) -> Tensor:
        table: Any = self.table
        angles = timesteps[:, None].to(table.dtype) * table
        angles = angles if self.scale == 1 else self.scale * angles  # rounded twice, as torch does
        waves = (angles.cos(), angles.sin()) if self.cosine_first else (angles.sin(), angles.cos())
        # the dtype of the tensor it is joined to
        return torch.cat(waves, dim=-1).to(timesteps.dtype)


class Patches(nn.Module):
    """diffusers' PatchEmbed that crops its positions: latents [B, C, Y, X] -> patches [B, L, D].

    The slices begin at quotients of positive numbers. From diffusers' own code torch's exporter
    makes -Y // 2, which torch rounds down but ONNX towards zero: wrong for an odd number of
    patches.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.proj: Any = source.proj
        self.patch: int = source.patch_size
        self.most: int = source.pos_embed_max_size
        self.register_buffer("positions", source.pos_embed.view(1, self.most, self.most, -1))

    def forward(self, latent: Tensor) -> Tensor:
        rows, columns = (side // self.patch for side in latent.shape[-2:])
        top, left = self._margin(rows), self._margin(columns)
        positions: Any = self.positions
        own = positions[:, top : top + rows, left : left + columns].flatten(1, 2)
        patches = self.proj(latent).flatten(2).transpose(1, 2)
        summed: Tensor = (patches + own).to(patches.dtype)
        return summed

    def _margin(self, side: int) -> int:
        """(most - side) // 2."""
        return self.most // 2 - (side + 1 - self.most % 2) // 2


def _patches(source: Any) -> nn.Module:
    """A network of one size needs no other: there diffusers' own is right."""
    own: nn.Module = source
    return Patches(source) if source.pos_embed_max_size else own


EXPORTED: dict[str, Callable[[Any], nn.Module]] = {
    "Timesteps": Frequencies,
    "PatchEmbed": _patches,
    **dict.fromkeys(("FluxPosEmbed", "Flux2PosEmbed"), Turned),
}
"""The exported replacements of diffusers' modules, by class name."""
PACKED = "packed_height_width"
"""The free side of latents that come packed as tokens: how many they are."""
POSITIONS = 128
"""Positions that are drawn lie below: rows and columns of the tokens of 2048 pixels."""


def exportable(
    net: nn.Module, table: Mapping[str, Callable[[Any], nn.Module]] = EXPORTED
) -> nn.Module:
    """A copy of the network on the same weights, with the modules in `EXPORTED`, or in another such
    table, replaced."""
    own = copy.copy(net)
    own._modules = {
        name: child if child is None else _exportable_child(child, table)
        for name, child in net._modules.items()
    }
    return own


def _exportable_child(
    module: nn.Module, table: Mapping[str, Callable[[Any], nn.Module]]
) -> nn.Module:
    if made := table.get(type(module).__name__):
        return made(module)
    within = any(type(child).__name__ in table for child in module.modules())
    return exportable(module, table) if within else module


class Exported(nn.Module):
    """hidden_states [B, …], timestep [] or [1], then `names` -> out_sample [B, …]: a transformer
    that is called by the names of its conditions."""

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.net, self.names = exportable(net), tuple(names)

    def forward(self, hidden_states: Tensor, timestep: Tensor, *told: Tensor) -> tuple[Tensor, ...]:
        net: Any = self.net
        given = dict(zip(self.names, told, strict=True))
        given["timestep"] = timestep.reshape(-1).expand(hidden_states.shape[0])
        return (net(hidden_states, **given, return_dict=False)[0],)


def draw(port: Port, sizes: dict[str, int], config: Any, generator: torch.Generator) -> Tensor:
    """A random input of `port` at the free sides `sizes`, at the scale that pipelines use."""
    shape = port.at(sizes)
    if port.name == "input_ids":
        ids = torch.randint(0, config.vocab_size, shape, generator=generator)
        ids[:, -1] = config.eos_token_id  # the pooled output is taken here
        return ids
    dtype = getattr(torch, port.dtype)
    if port.name == "class_labels" and not dtype.is_floating_point:
        classes = config.get("num_class_embeds") or config.num_embeds_ada_norm
        return torch.randint(0, classes, shape, generator=generator)
    if port.name.endswith("attention_mask"):  # the last tokens are padding, of each text other ones
        lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
        return (torch.arange(shape[1]) < lengths).to(dtype)
    if port.name == "timestep":
        return torch.full(shape, 500.0, dtype=dtype)
    if port.name == "time_ids":  # height, width, top, left, height, width in pixels
        return torch.randint(0, 1024, shape, generator=generator).to(dtype)
    if port.name in ("img_ids", "txt_ids"):
        return torch.randint(0, POSITIONS, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def latents_of(folder: str, net: Any, dtype: torch.dtype) -> tuple[Port, Port]:
    """The latents and the prediction of a network on patches that has positions for one size."""
    config: Any = net.config
    if not isinstance(config.sample_size, int):
        raise unsupported(folder, "sample_size", config)
    side, kind = config.sample_size, dtype_name(dtype)
    wide = config.out_channels or config.in_channels
    return (
        Port("hidden_states", kind, ("batch_size", config.in_channels, side, side)),
        Port("out_sample", kind, ("batch_size", wide, side, side)),
    )


def patch_size(net: Any) -> int:
    """What divides the latents' sides of a network on patches."""
    patch: int = net.config.patch_size
    return patch


def sides(batch: int, height: int, width: int) -> dict[str, int]:
    """The free sides of a picture or of latents."""
    return {"batch_size": batch, "height": height, "width": width}


def packed_cases(words: int) -> tuple[dict[str, int], ...]:
    """Free sides of a network of packed latents: those that are traced, then those to verify;
    `words`: the tokens of a usual text."""
    sizes = ((2, 24, 7), (1, 64, words), (3, 15, 5), (2, 28, 9))
    return tuple(
        {"batch_size": batch, PACKED: tokens, "sequence_length": length}
        for batch, tokens, length in sizes
    )


def unsupported(folder: str, key: str, config: Any) -> UserError:
    """The error for a config that has more than a single number for `key`."""
    return UserError(f"{folder} has {key} {getattr(config, key)!r}; supported is one number")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _side(side: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(side, int):
        return side
    times, _, whole = side.rpartition("*")
    name, _, parts = whole.partition("//")
    return int(times or 1) * sizes[name] // int(parts or 1)
