"""Decodes a picture in strips of rows: the same picture, up to rounding, in less memory.

A `Picture` computes its rows on demand. A convolution needs one more row above and below, so each
picture requests rows of the one before it, down to one whose strips are in memory. A GroupNorm
needs the moments of the whole picture: one pass over all strips keeps only these, and the next pass
computes the rows again, unless there was room to keep them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fastdiff.kernels.conv2d import conv2d
from fastdiff.kernels.line_silu import line_silu
from fastdiff.kernels.moments import moments
from fastdiff.models.borrow import Norm, Weights
from fastdiff.models.resnets import Resnet, Up
from fastdiff.models.sums import Sum

Rows = Callable[[int, int], Tensor]
"""(first, last) -> rows [1, last - first, X, C] of a picture, without row `last`."""
SLAB = 1 << 16
"""Values in a slab of pixels whose moments are computed at once: they fit a core's L2 cache."""


@dataclass
class Room:
    """Bytes that are left for keeping strips."""

    left: int


@dataclass
class Picture:
    """[1, Y, X, C] in strips of `height` rows; the last one may be lower."""

    sides: tuple[int, int]
    """Y and X."""
    height: int
    room: Room
    make: Rows | None = None
    """None if all strips are kept."""
    spare: Callable[[int], object] = lambda row: None
    """Called when `make` will need no row above this one any more."""
    _kept: dict[int, Tensor] = field(default_factory=dict)
    """By the strip's index."""
    _last: tuple[int, Tensor] | None = None
    """The rows made last, and the index of the first: the next strip needs its border again, as do
    a branch and its residual."""

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """The first row of each strip, and the row after its last."""
        rows = self.sides[0]
        return [(row, min(row + self.height, rows)) for row in range(0, rows, self.height)]

    def rows(self, first: int, last: int) -> Tensor:
        """See `Rows`."""
        pieces, row, made = [], first, False
        begin, lately = (0, None) if self._last is None else self._last
        while row < last:
            number = row // self.height
            strip, above = self._kept.get(number), number * self.height
            if strip is None and lately is not None and 0 <= row - begin < lately.shape[1]:
                strip, above = lately, begin
            if strip is not None:
                piece = strip[:, row - above : last - above]
            else:
                self._last, lately, made = None, None, True
                kept = (i * self.height for i in self._kept if i > number)
                piece = self._made(row, min(last, *kept, last))
            pieces.append(piece)
            row += piece.shape[1]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        if made:
            self._last = first, whole
        return whole

    def strips(self) -> Iterator[Tensor]:
        """All strips, from the top. They are kept as they are made, until one finds no room."""
        room = True
        for first, last in self.spans:
            strip = self.rows(first, last)
            if first // self.height not in self._kept:
                room = room and strip.nbytes <= self.room.left
                if room:
                    self.keep(first, strip)
            yield strip
            del strip
            self.drop(0)
        self._last = None

    def keep(self, first: int, strip: Tensor) -> None:
        """Keep the strip that begins at row `first`, in its own memory."""
        whole = strip.untyped_storage().nbytes() == strip.nbytes
        self._kept[first // self.height] = strip if whole else strip.clone()
        self.room.left -= strip.nbytes

    def drop(self, row: int) -> None:
        """Drop the rows above this one, which are not needed any more."""
        for number in [n for n in self._kept if self.spans[n][1] <= row]:
            self.room.left += self._kept.pop(number).nbytes
        below = range(max(0, row) // self.height, len(self.spans))
        unkept = (max(row, self.spans[n][0]) for n in below if n not in self._kept)
        self.spare(next(unkept, self.sides[0]))

    def _made(self, first: int, last: int) -> Tensor:
        if self.make is None:
            raise AssertionError(f"rows {first} to {last} were dropped")
        return self.make(first, last)


class Strips:
    """Pictures that take `bytes` together.

    A twelfth is for the strip in progress: each of its rows needs what a row of a whole picture
    needs. The rest is for strips that are kept.
    """

    def __init__(self, bytes: int) -> None:
        self._working = bytes // 12
        self.room = Room(bytes - self._working)

    def height(self, row: int) -> int:
        """The rows of a strip, if each takes `row` bytes while the strip is in progress."""
        return max(1, self._working // row)

    def held(self, x: Sum | Picture, row: int) -> Picture:
        """A picture [1, Y, X, C] in memory, as strips; `row`, here and below: see `height`."""
        if isinstance(x, Picture):
            return x
        whole = x.closed()
        picture = Picture((whole.shape[1], whole.shape[2]), self.height(row), self.room)
        for first, last in picture.spans:
            picture.keep(first, whole[:, first:last])
        return picture

    def enlarged(self, x: Picture, up: Up, row: int) -> Picture:
        """x at twice the height and width, convolved."""

        def make(first: int, last: int) -> Tensor:
            above, below = max(0, (first - 1) // 2), min(x.sides[0], last // 2 + 1)
            source = x.rows(above, below)
            size = (2 * source.shape[1], 2 * source.shape[2])
            made = conv2d(source, up.conv.weight, up.conv.bias, size=size)
            return made[:, first - 2 * above : last - 2 * above]

        def spare(row: int) -> None:
            x.drop(x.sides[0] if row == sides[0] else row // 2 - 1)

        sides = (2 * x.sides[0], 2 * x.sides[1])
        return Picture(sides, self.height(row), self.room, make, spare)

    def resnet(self, x: Picture, block: Resnet, row: int) -> Picture:
        """The result of `block` for x, which is dropped strip by strip."""
        rows, height = x.sides[0], self.height(row)
        branch = normed(x, block.norm1)
        h = Picture(
            x.sides,
            height,
            self.room,
            lambda first, last: convolved_rows(branch, block.conv1, rows, first, last),
        )
        branch2 = normed(h, block.norm2)

        def end_of(first: int, last: int) -> Tensor:
            around, conv = block.around(x.rows(first, last)), block.conv2
            return conv2d(branch2(first, last), conv.weight, conv.bias, residual=around)

        out = Picture(x.sides, height, self.room)
        for first, last in out.spans:
            above, below = max(0, first - 1), min(rows, last + 1)
            x.rows(max(0, above - 1), min(rows, below + 1))  # once, for the branch and its residual
            out.keep(first, end_of(above, below)[:, first - above : last - above])
            end = last == rows
            h.drop(rows if end else last - 1)
            x.drop(rows if end else last - 2)
        return out

    def finish(self, x: Picture, norm: Norm, conv: Weights) -> Tensor:
        """A decoder's last norm, SiLU and convolution: [1, Y, X, 3]."""
        normal, made = normed(x, norm), []
        for first, last in x.spans:
            made.append(convolved_rows(normal, conv, x.sides[0], first, last))
            x.drop(last - 1)
        return torch.cat(made, 1)


def normed(x: Picture, norm: Norm) -> Rows:
    """The GroupNorm of the whole of x, with SiLU."""
    found = []
    for strip in x.strips():
        pixels, slab = strip.numel() // strip.shape[-1], max(1, SLAB // strip.shape[-1])
        counts = [min(slab, pixels - at) for at in range(0, pixels, slab)]
        mean, rest, square = moments(strip, slab).double().unbind(1)
        found.append((pixels, *combined(mean + rest, square, counts)))
        dtype = strip.dtype
        del strip  # before the next strip is made
    pixels_of, means, squares = zip(*found, strict=True)
    mean, square = combined(torch.stack(means), torch.stack(squares), pixels_of)
    line = line_of(norm, mean, square / sum(pixels_of))
    line = line if dtype == torch.float64 else line.float()
    return lambda first, last: line_silu(x.rows(first, last), line)


def combined(means: Tensor, squares: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The joint mean and centred squares [C] of samples with means and squares [samples, C] of
    `counts` values each (Chan et al., 1979)."""
    count = means.new_tensor(counts)[:, None]
    mean = (means * count).sum(0) / sum(counts)
    return mean, (squares + (means - mean).square() * count).sum(0)


def line_of(norm: Norm, mean: Tensor, variance: Tensor) -> Tensor:
    """A GroupNorm's centre, slope and offset [3, C] in float64, from each channel's mean and
    variance [C]. The centre is rounded to float32; the offset makes up for the rounding."""
    grouped = mean.view(norm.groups, -1)
    exact = grouped.mean(1, keepdim=True)
    spread = variance.view(norm.groups, -1) + (grouped - exact).square()
    deviation = (spread.mean(1, keepdim=True) + norm.eps).sqrt()
    exact, deviation = (t.expand_as(grouped).reshape(-1) for t in (exact, deviation))
    centre, slope = exact.float().double(), norm.weight.double() / deviation
    return torch.stack((centre, slope, norm.bias.double() + (centre - exact) * slope))


def convolved_rows(source: Rows, weights: Weights, rows: int, first: int, last: int) -> Tensor:
    """Rows `first` to `last` of the 3×3 convolution of a picture with `rows` rows."""
    above, below = max(0, first - 1), min(rows, last + 1)
    made = conv2d(source(above, below), weights.weight, weights.bias)
    return made[:, first - above : last - above]
