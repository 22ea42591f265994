"""Where Z-Image's tokens stand, as tables of cosines and sines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.blocks import require
from fastdiff.models.borrow import Loan

Table = tuple[Tensor, Tensor]
"""Cosines and sines [S, K] float32, as `qk_norm` takes them."""


@dataclass(frozen=True)
class Axes:
    """A token has a position on each axis; axis i turns the next `widths[i]` columns of a head."""

    theta: float
    widths: Sequence[int]
    lengths: Sequence[int]
    """Positions on each axis that diffusers has a row for."""

    def picture(
        self, first: int, counts: tuple[int, int], missing: int, device: torch.device
    ) -> Table:
        """Of rows · columns patches at `first` on the first axis, then of `missing` more at 0."""
        rows, columns = (torch.arange(count) for count in counts)
        down, right = torch.meshgrid(rows, columns, indexing="ij")
        ids = torch.stack((torch.full_like(down, first), down, right), -1).flatten(0, 1)
        return self._table(torch.cat((ids, ids.new_zeros(missing, 3))), device)

    def caption(self, length: int, device: torch.device) -> Table:
        """Of a caption's tokens, which stand on the first axis from 1 on."""
        ids = torch.zeros(length, 3, dtype=torch.long)
        ids[:, 0] = torch.arange(1, length + 1)
        return self._table(ids, device)

    def _table(self, ids: Tensor, device: torch.device) -> Table:
        """Angles are rounded to float32 before their cosines, as in diffusers' own tables."""
        angles = []
        for axis, width in enumerate(self.widths):
            steps = torch.arange(0, width, 2, dtype=torch.float64)
            angles.append(torch.outer(ids[:, axis].double(), 1.0 / self.theta ** (steps / width)))
        turned = torch.cat(angles, 1).float().repeat_interleave(2, 1)
        return turned.cos().to(device), turned.sin().to(device)


def borrow_axes(module: Any, loan: Loan, head: int) -> Axes:
    """From diffusers' RopeEmbedder, for heads of `head` columns."""
    rope = loan.open(module, "RopeEmbedder")
    widths, lengths = rope.axes_dims, rope.axes_lens
    require(
        len(widths) == len(lengths) == 3 and sum(widths) == head,
        f"positions that turn {list(widths)} columns of heads of {head}",
    )
    return Axes(rope.theta, tuple(widths), tuple(lengths))
