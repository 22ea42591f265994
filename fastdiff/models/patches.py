"""Latents cut into patches, which are a transformer's tokens, and the patches' positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.blocks import require
from fastdiff.models.borrow import Loan, Weights


@dataclass(frozen=True)
class Patches:
    """Latents cut into squares; a remainder at the lower or right edge is dropped, as in
    diffusers."""

    size: int
    embed: Weights
    """The convolution of stride `size`, as a linear layer on a flat patch."""

    @property
    def channels(self) -> int:
        return self.embed.weight.shape[1] // self.size**2

    def counts(self, sides: Sequence[int]) -> tuple[int, int]:
        """The rows and columns of patches."""
        return sides[0] // self.size, sides[1] // self.size

    def pack(self, latents: Tensor) -> Tensor:
        """[B, C, Y, X] -> contiguous [B, L, p·p·C]."""
        p, (rows, columns) = self.size, self.counts(latents.shape[2:])
        count, channels = latents.shape[:2]
        whole = latents[..., : rows * p, : columns * p]
        cut: Tensor = whole.unflatten(3, (columns, p)).unflatten(2, (rows, p))
        moved = cut.permute(0, 2, 4, 3, 5, 1).contiguous()
        return moved.view(count, rows * columns, p * p * channels)

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        """[B, L, p·p·C] -> contiguous [B, C, Y, X], without the remainder."""
        p, (rows, columns) = self.size, self.counts(sides)
        count, channels = x.shape[0], x.shape[2] // p**2  # the count may be 0
        cut = x.view(count, rows, columns, p, p, channels)
        moved = cut.permute(0, 5, 1, 3, 2, 4).contiguous()
        return moved.view(count, channels, rows * p, columns * p)


@dataclass(frozen=True)
class Positions:
    """Position embeddings for a square of patches; smaller pictures use its middle."""

    table: Tensor
    """[1, side·side, D]"""
    side: int

    def __call__(self, counts: tuple[int, int]) -> Tensor:
        """[1, L, D], contiguous."""
        rows, columns = counts
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        square = self.table.view(1, self.side, self.side, -1)
        middle = square[:, top : top + rows, left : left + columns]
        return middle.reshape(1, rows * columns, -1)


@dataclass(frozen=True)
class SizedPositions(Positions):
    """Position embeddings for any number of patches; diffusers computes those of other numbers
    than `side` by `side` in every call: sinusoids of the column, then of the row."""

    scale: float

    def __call__(self, counts: tuple[int, int]) -> Tensor:
        """[1, L, D], contiguous; float32, or the table's dtype for its own size."""
        if counts == (self.side, self.side):
            return self.table
        rows, columns = (
            torch.arange(count, dtype=torch.float32) / (count / self.side) / self.scale
            for count in counts
        )
        quarter = self.table.shape[2] // 4
        frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
        down, right = torch.meshgrid(rows, columns, indexing="ij")
        angles = [torch.outer(side.flatten(), frequencies) for side in (right, down)]
        waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
        return torch.cat(waves, dim=1)[None].float().to(self.table.device)


def borrow_patches(
    module: Any, loan: Loan, own_size: bool = False
) -> tuple[Patches, Positions | None]:
    """From a PatchEmbed.

    own_size: from one without pos_embed_max_size, whose table is for a square of exactly `side`;
    for pictures of any other size diffusers computes another.
    """
    embed = loan.open(module, "PatchEmbed")
    require(embed.norm is None and not embed.layer_norm, "a norm of embedded patches")
    require(bool(embed.flatten), "embedded patches that are not flattened")
    size = embed.patch_size
    weights = loan.conv(embed.proj, kernel=size, stride=size, padding=0)
    # put the channels last, so that rows, columns and channels are one dimension
    flat = Weights(weights.weight.permute(0, 2, 3, 1).view(len(weights.weight), -1), weights.bias)
    table, side = embed.pos_embed, embed.pos_embed_max_size
    if table is None:
        return Patches(size, flat), None
    if own_size:
        side = embed.height
        require(not embed.pos_embed_max_size and side == embed.width, "positions of other sizes")
    require(bool(side), "positions that are computed for each size (no pos_embed_max_size)")
    require(
        table.dtype in (loan.dtype, *((torch.float32,) if own_size else ()))
        and table.device == loan.device,
        f"positions of {table.dtype} on {table.device}",
    )
    require(
        table.shape == (1, side * side, flat.weight.shape[0]) and table.is_contiguous(),
        f"positions of {list(table.shape)}",
    )
    return Patches(size, flat), Positions(table, side)
