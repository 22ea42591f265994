"""Rotary position embeddings: tables of cosines and sines, one row for each token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.models.blocks import require
from fastdiff.models.borrow import Loan, Unsupported


class Turns(NamedTuple):
    """How far each pair of a head's columns is turned, as `qk_norm` takes it."""

    cos: Tensor
    """[L, K] float32; both columns of a pair have the same."""
    sin: Tensor
    """[L, K] float32."""

    def cut(self, at: int) -> tuple["Turns", "Turns"]:
        """The rotations of the first `at` tokens, and those of the others."""
        return Turns(self.cos[:at], self.sin[:at]), Turns(self.cos[at:], self.sin[at:])


@dataclass(frozen=True)
class Rotary:
    """A token has a position on every axis; axis i turns the next `axes[i]` columns of a head."""

    theta: float
    axes: Sequence[int]

    @property
    def width(self) -> int:
        """The columns of a head."""
        return sum(self.axes)

    def __call__(self, positions: Tensor) -> Turns:
        """positions [L, axes], of any dtype -> tables [L, K], computed in float64 as Flux does."""
        angles = []
        for axis, width in enumerate(self.axes):
            steps = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
            frequencies = 1.0 / self.theta ** (steps / width)
            angles.append(positions[:, axis, None].float() * frequencies)
        turned = torch.cat(angles, dim=1)
        both = (turned.cos(), turned.sin())
        return Turns(*(table.repeat_interleave(2, dim=1).float() for table in both))


def first(ids: Tensor | None) -> Tensor | None:
    """The positions [L, axes] of the first picture, which diffusers takes for all."""
    return ids[0] if ids is not None and ids.ndim == 3 and len(ids) else ids


def check_positions(
    name: str, positions: Tensor | None, weight: Tensor, tokens: int, rotary: Rotary
) -> None:
    """Raise Unsupported unless `name` has a position for each of the tokens, on `weight`'s
    device."""
    if positions is None:
        raise Unsupported(f"{name} is missing")
    shape = [tokens, len(rotary.axes)]
    fits = list(positions.shape) == shape and positions.device == weight.device
    require(fits, f"{name} has the shape {list(positions.shape)}; expected {shape}")


def borrow_rotary(module: Any, loan: Loan, width: int, name: str = "FluxPosEmbed") -> Rotary:
    """From diffusers' embedding of class `name`, for heads of `width` columns."""
    embed = loan.open(module, name)
    rotary = Rotary(embed.theta, embed.axes_dim)
    require(
        rotary.width == width and all(axis % 2 == 0 for axis in rotary.axes),
        f"positions that turn {list(rotary.axes)} columns of heads of {width}",
    )
    return rotary
