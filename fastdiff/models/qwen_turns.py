"""The positions of Qwen-Image's tokens, as tables of cosines and sines."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.blocks import require
from fastdiff.models.borrow import Loan
from fastdiff.models.rotary import Turns

Shape = tuple[int, int, int]
"""Frames, rows and columns of a picture's tokens."""
Shapes = Sequence[Sequence[Shape] | Shape]
"""For each of the latents, its picture and those beside it, or its picture alone."""


@dataclass(frozen=True)
class Places:
    """Pictures are centred at 0 on the axes of rows and columns; texts follow them on all axes."""

    ahead: Tensor
    """[4096, K / 2] complex: diffusers' table of the positions 0, 1, …"""
    behind: Tensor
    """[4096, K / 2] complex: of the positions …, -2, -1."""
    widths: Sequence[int]
    """How many columns of a head each axis turns: frames, rows, columns."""

    def check(self, shapes: Shapes, tokens: int, text: int) -> None:
        """Raise Unsupported unless `tokens` are those of `shapes`, and there are positions for them
        and for a text."""
        pictures = _pictures(shapes)
        require(all(_pictures([one]) == pictures for one in shapes), "pictures of several sizes")
        counts = [frames * rows * columns for frames, rows, columns in pictures]
        require(sum(counts) == tokens, f"img_shapes of {sum(counts)} tokens for {tokens}")
        last = max(_first(pictures) + text, *(i + shape[0] for i, shape in enumerate(pictures)))
        require(last <= len(self.ahead), f"{last} positions; there are {len(self.ahead)}")

    def __call__(self, shapes: Shapes, text: int, device: torch.device) -> tuple[Turns, Turns]:
        """The rotations of the pictures' tokens, and those of `text` tokens."""
        pictures = _pictures(shapes)
        first = _first(pictures)
        own = torch.cat([self._picture(i, shape) for i, shape in enumerate(pictures)])
        return _turns(own, device), _turns(self.ahead[first : first + text], device)

    def _picture(self, frame: int, shape: Shape) -> Tensor:
        """[L, K / 2] of the picture that is the `frame`th, counted from 0."""
        frames, rows, columns = shape
        ends = list(accumulate(width // 2 for width in self.widths))
        parts = (
            self.ahead[frame : frame + frames, : ends[0]].view(frames, 1, 1, -1),
            self._around(rows)[:, ends[0] : ends[1]].view(1, rows, 1, -1),
            self._around(columns)[:, ends[1] :].view(1, 1, columns, -1),
        )
        spread = [part.expand(frames, rows, columns, -1) for part in parts]
        return torch.cat(spread, dim=-1).flatten(0, 2)

    def _around(self, count: int) -> Tensor:
        """`count` positions around 0; if the number is odd, one more is below 0."""
        half = count // 2
        return torch.cat((self.behind[len(self.behind) - (count - half) :], self.ahead[:half]))


def _pictures(shapes: Shapes) -> list[Shape]:
    """The shapes of the first of the latents."""
    first: Any = shapes[0]
    return list(first) if isinstance(first, list) else [first]


def _first(pictures: Sequence[Shape]) -> int:
    """The position of a text's first token."""
    return max(max(rows // 2, columns // 2) for _, rows, columns in pictures)


def _turns(table: Tensor, device: torch.device) -> Turns:
    """A complex table [L, K / 2] as `qk_norm` takes it."""
    parts = (part.repeat_interleave(2, dim=1).float() for part in (table.real, table.imag))
    return Turns(*(part.contiguous().to(device) for part in parts))


def borrow_places(module: Any, loan: Loan, head: int) -> Places:
    """From diffusers' QwenEmbedRope, for heads of `head` columns."""
    rope = loan.open(module, "QwenEmbedRope")
    require(bool(rope.scale_rope), "pictures that do not stand around 0")
    widths, tables = rope.axes_dim, (rope.pos_freqs, rope.neg_freqs)
    known = isinstance(widths, list | tuple) and len(widths) == 3 and sum(widths) == head
    for table in tables:
        known = known and isinstance(table, Tensor) and table.is_complex()
        known = known and table.ndim == 2 and 2 * table.shape[1] == head
    require(known, f"positions that turn {widths} columns of {head}")
    return Places(*tables, tuple(widths))
