"""The positions of Z-Image's tokens, as tables of cosines and sines."""

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

    tables: tuple[Tensor, ...]
    """[positions, width / 2] complex, as diffusers keeps them."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions on each axis that there is a row for."""
        return tuple(len(table) for table in self.tables)

    def picture(
        self, first: int, counts: tuple[int, int], missing: int, device: torch.device
    ) -> Table:
        """The table of rows · columns patches at `first` on the first axis, then `missing` at 0."""
        rows, columns = (torch.arange(count) for count in counts)
        down, right = torch.meshgrid(rows, columns, indexing="ij")
        ids = torch.stack((torch.full_like(down, first), down, right), -1).flatten(0, 1)
        return self._table(torch.cat((ids, ids.new_zeros(missing, 3))), device)

    def caption(self, length: int, device: torch.device) -> Table:
        """Positions of a caption's tokens, on the first axis from 1 on."""
        ids = torch.zeros(length, 3, dtype=torch.long)
        ids[:, 0] = torch.arange(1, length + 1)
        return self._table(ids, device)

    def _table(self, ids: Tensor, device: torch.device) -> Table:
        columns = zip(self.tables, ids.unbind(1), strict=True)
        turned = torch.cat([table[at.to(table.device)] for table, at in columns], 1)
        parts = (part.repeat_interleave(2, 1).contiguous() for part in (turned.real, turned.imag))
        cos, sin = (part.to(device) for part in parts)
        return cos, sin


def borrow_axes(module: Any, loan: Loan, head: int) -> Axes:
    """From diffusers' RopeEmbedder, for heads of `head` columns."""
    rope = loan.open(module, "RopeEmbedder")
    theta, widths, lengths = rope.theta, rope.axes_dims, rope.axes_lens
    known = all(isinstance(each, list | tuple) and len(each) == 3 for each in (widths, lengths))
    require(known and sum(widths) == head, f"positions that turn {widths} columns of {head}")
    if module.freqs_cis is None:  # as its first call does, which must change nothing
        module.freqs_cis = module.precompute_freqs_cis(widths, lengths, theta=theta)
    tables = rope.freqs_cis
    right = [(n, width // 2) for n, width in zip(lengths, widths, strict=True)]
    require([tuple(table.shape) for table in tables] == right, "positions of other axes")
    return Axes(tuple(tables))
