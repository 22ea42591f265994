"""What is exported of a network: one ONNX file, with inputs and outputs as Optimum names them."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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

    example: the free sides it is traced at; cases: the other sides it is verified at.
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


def exportable(net: nn.Module) -> nn.Module:
    """The same weights in a network of its own, which every runtime computes as torch does: each
    Timesteps in it as `Frequencies`, each PatchEmbed with positions cut out by `_middle`."""
    own = copy.copy(net)
    own._modules = {
        name: child if child is None else _told(child) for name, child in net._modules.items()
    }
    return own


def _told(module: nn.Module) -> nn.Module:
    if type(module).__name__ == "Timesteps":
        return Frequencies(module)
    if type(module).__name__ == "PatchEmbed" and module.pos_embed_max_size:
        own: Any = copy.copy(module)
        own.cropped_pos_embed = partial(_middle, own)
        return own  # type: ignore[no-any-return]
    within = any(type(child).__name__ in ("Timesteps", "PatchEmbed") for child in module.modules())
    return exportable(module) if within else module


def _middle(embed: Any, height: int, width: int) -> Tensor:
    """PatchEmbed.cropped_pos_embed, which divides nothing negative.

    torch's exporter writes (most - rows) // 2 as most // 2 + -rows // 2, and ONNX rounds that
    toward zero: of an odd number of rows it would take one too many.
    """
    most, (rows, columns) = (
        embed.pos_embed_max_size,
        (n // embed.patch_size for n in (height, width)),
    )
    top, left = (most // 2 - (count + 1 - most % 2) // 2 for count in (rows, columns))
    square = embed.pos_embed.reshape(1, most, most, -1)
    middle = square[:, top : top + rows, left : left + columns]
    cut: Tensor = middle.reshape(1, -1, middle.shape[-1])
    return cut


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
