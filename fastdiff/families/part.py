"""What is exported of a network: one ONNX file, with inputs and outputs as Optimum names them."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import UserError


@dataclass(frozen=True)
class Port:
    """One input or output: a torch dtype's name and a shape whose named sides are free.

    A side of an output may be a multiple of a free one, "8*height", or a fraction, "height//8".
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape where the free sides are `sizes`."""
        return tuple(_side(side, sizes) for side in self.shape)


@dataclass(frozen=True)
class Part:
    """One ONNX file. `module` takes `inputs` by position and returns a tuple of `outputs`.

    example: the free sides it is traced at; cases: the other sides it is verified at, its own size
    and the full length of its text first; most: the greatest height and width it takes.
    Free sides are latents of a denoising network or VAE decoder, pixels of a VAE encoder, tokens of
    text. A denoising network's first input are the latents, its second the timestep; the others
    have the names of its conditions.
    """

    folder: str
    source: nn.Module
    """The pipeline's own, of which `module` may be a copy in another dtype."""
    module: nn.Module
    dtype: torch.dtype
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    example: dict[str, int]
    cases: tuple[dict[str, int], ...]
    most: int | None = None

    @property
    def net(self) -> Any:  # diffusers' or transformers' own
        return self.module.net

    @property
    def file(self) -> str:
        return f"{self.folder}/model.onnx"

    def sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """The free sides, read off the shapes of inputs by name."""
        return {
            side: size
            for port in self.inputs
            for side, size in zip(port.shape, shapes.get(port.name, ()), strict=False)
            if isinstance(side, str)
        }


class Frequencies(nn.Module):
    """diffusers' Timesteps [B] -> [B, C] with its frequencies as a constant of torch's own bits.

    A runtime whose exp differs by one rounding is 1e-4 rad away at timestep 999.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        half = source.num_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32)
        table = source.scale * torch.exp(exponent / (half - source.downscale_freq_shift))
        self.cosine_first = source.flip_sin_to_cos
        self.register_buffer("table", table)

    def forward(self, timesteps: Tensor) -> Tensor:
        table: Any = self.table
        angles = timesteps[:, None].to(table.dtype) * table
        waves = (angles.cos(), angles.sin()) if self.cosine_first else (angles.sin(), angles.cos())
        return torch.cat(waves, dim=-1).to(timesteps.dtype)  # that of what it is joined to


class Patches(nn.Module):
    """diffusers' PatchEmbed that crops its positions: latents [B, C, Y, X] -> patches [B, L, D].

    The slices begin at quotients of positive numbers. What torch's exporter makes of diffusers' own
    is -Y // 2, which torch rounds down and ONNX towards zero: wrong where Y is an odd number of
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


EXPORTED: dict[str, Callable[[Any], nn.Module]] = {"Timesteps": Frequencies, "PatchEmbed": Patches}
"""What stands in a file for modules of diffusers, by the names of their classes."""


def exportable(net: nn.Module) -> nn.Module:
    """The same weights in a network of its own, every module in it as `EXPORTED` has it."""
    own = copy.copy(net)
    own._modules = {
        name: child if child is None else _told(child) for name, child in net._modules.items()
    }
    return own


def _told(module: nn.Module) -> nn.Module:
    if made := EXPORTED.get(type(module).__name__):
        return made(module)
    within = any(type(child).__name__ in EXPORTED for child in module.modules())
    return exportable(module) if within else module


def draw(port: Port, sizes: dict[str, int], config: Any, generator: torch.Generator) -> Tensor:
    """A random input of `port` at the free sides `sizes`, of the scale a pipeline gives it."""
    shape = port.at(sizes)
    if port.name == "input_ids":
        ids = torch.randint(0, config.vocab_size, shape, generator=generator)
        ids[:, -1] = config.eos_token_id  # where the pooled output is taken
        return ids
    dtype = getattr(torch, port.dtype)
    if port.name == "timestep":
        return torch.full(shape, 500.0, dtype=dtype)
    if port.name == "time_ids":  # height, width, top, left, height, width in pixels
        return torch.randint(0, 1024, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def sides(batch: int, height: int, width: int) -> dict[str, int]:
    """The free sides of a picture or of latents."""
    return {"batch_size": batch, "height": height, "width": width}


def unsupported(folder: str, key: str, config: Any) -> UserError:
    """That a config has no single number."""
    return UserError(f"{folder} has {key} {getattr(config, key)!r}; supported is one number")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _side(side: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(side, int):
        return side
    times, _, whole = side.rpartition("*")
    name, _, parts = whole.partition("//")
    return int(times or 1) * sizes[name] // int(parts or 1)
