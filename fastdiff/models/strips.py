"""A decoder's pictures in strips of rows: the same picture, up to rounding, in less memory.

A picture here is made when somebody asks for rows of it. A convolution asks for a row more above
and below; so one asks the other, down to a picture whose strips lie in memory. A GroupNorm needs
the moments of the whole, so it is a pass over all strips that keeps only these; the next pass makes
the rows again, or finds those that were kept because there was room.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdiff.kernels.line_silu import line_silu
from fastdiff.kernels.moments import moments
from fastdiff.models.blocks import Resnet, Up
from fastdiff.models.borrow import Norm, Weights
from fastdiff.models.sums import Sum, convolved

Rows = Callable[[int, int], Tensor]
"""(first, last) -> rows [1, last - first, X, C] of a picture, `last` being the one after them."""
SLAB = 1 << 16
"""Numbers of a slab of pixels whose moments are found at once: they stay in a core's L2."""


@dataclass
class Room:
    """Bytes that kept strips may take yet."""

    left: int


@dataclass
class Picture:
    """[1, Y, X, C] in strips of `height` rows, the last of which may be lower."""

    sides: tuple[int, int]
    """Y and X."""
    height: int
    room: Room
    make: Rows | None = None
    """None where all strips are kept."""
    spare: Callable[[int], object] = lambda row: None
    """Told that `make` will be asked for no row above this one any more."""
    _kept: dict[int, Tensor] = field(default_factory=dict)
    """By number of the strip."""
    _last: tuple[int, Tensor] | None = None
    """What was made last, and its first row: a branch and the way around it ask for the same."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First row of each strip, and the one after it."""
        rows = self.sides[0]
        return [(row, min(row + self.height, rows)) for row in range(0, rows, self.height)]

    def rows(self, first: int, last: int) -> Tensor:
        """As `Rows`."""
        pieces = []
        while first < last:
            number = first // self.height
            strip = self._kept.get(number)
            if strip is None:
                kept = (i * self.height for i in self._kept if i > number)
                end = min(last, *kept, last)
                pieces.append(self._made(first, end))
            else:
                end = min(last, number * self.height + strip.shape[1])
                pieces.append(strip[:, first - number * self.height :][:, : end - first])
            first = end
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def strips(self) -> Iterator[Tensor]:
        """All, from above. Those that are made are kept until one finds no room."""
        room = True
        for first, last in self.spans:
            strip = self.rows(first, last)
            if first // self.height not in self._kept:
                room = room and strip.nbytes <= self.room.left
                if room:
                    self.keep(first, strip)
            yield strip
            self.drop(0)
        self._last = None

    def keep(self, first: int, strip: Tensor) -> None:
        """Have the strip that begins with the row `first`, in memory of its own."""
        whole = strip.untyped_storage().nbytes() == strip.nbytes
        self._kept[first // self.height] = strip if whole else strip.clone()
        self.room.left -= strip.nbytes

    def drop(self, row: int) -> None:
        """Forget the rows above this one: nobody will ask for them any more."""
        for first, last in self.spans:
            number = first // self.height
            if last <= row and number in self._kept:
                self.room.left += self._kept.pop(number).nbytes
        unkept = (max(row, f) for f, end in self.spans if end > row and f // self.height not in self._kept)
        self.spare(next(unkept, self.sides[0]))

    def _made(self, first: int, last: int) -> Tensor:
        if self._last is not None:
            begin, made = self._last
            if begin <= first and last <= begin + made.shape[1]:
                return made[:, first - begin : last - begin]
            self._last = None
        if self.make is None:
            raise AssertionError(f"rows {first} to {last} were dropped")
        made = self.make(first, last)
        self._last = first, made
        return made


class Strips:
    """Pictures that take `bytes` at once.

    An eighth of them is for the strip that is being worked on, whose rows need what a whole picture
    needs for each of its rows. The rest is for strips that are kept.
    """

    def __init__(self, bytes: int) -> None:
        self._working = bytes // 8
        self.room = Room(bytes - self._working)

    def height(self, row: int) -> int:
        """Rows of a strip, of which one takes `row` bytes while it is worked on."""
        return max(1, self._working // row)

    def held(self, x: Sum | Picture, row: int) -> Picture:
        """A picture [1, Y, X, C] that is there, in strips."""
        if isinstance(x, Picture):
            return x
        whole = x.closed()
        picture = Picture((whole.shape[1], whole.shape[2]), self.height(row), self.room)
        for first, last in picture.spans:
            picture.keep(first, whole[:, first:last])
        return picture

    def enlarged(self, x: Picture, up: Up, row: int) -> Picture:
        """x twice as high and wide, convolved."""

        def make(first: int, last: int) -> Tensor:
            above, below = max(0, (first - 1) // 2), min(x.sides[0], last // 2 + 1)
            made = up(Sum(x.rows(above, below))).closed()
            return made[:, first - 2 * above : last - 2 * above]

        sides = (2 * x.sides[0], 2 * x.sides[1])
        return Picture(sides, self.height(row), self.room, make, lambda row: x.drop(row // 2 - 1))

    def resnet(self, x: Picture, block: Resnet, row: int) -> Picture:
        """What `block` makes of x, which is dropped on the way."""
        rows, height = x.sides[0], self.height(row)
        branch = normed(x, block.norm1)
        h = Picture(
            x.sides,
            height,
            self.room,
            lambda first, last: convolved_rows(branch, block.conv1, rows, first, last),
        )
        branch2 = normed(h, block.norm2)
        out = Picture(x.sides, height, self.room)
        for first, last in out.spans:
            above, below = max(0, first - 1), min(rows, last + 1)
            out.keep(
                first,
                convolved(
                    branch2(above, below), block.conv2, block.around(x.rows(above, below))
                ).closed()[:, first - above : last - above],
            )
            h.drop(last - 1)
            x.drop(last - 2)
        return out

    def finish(self, x: Picture, norm: Norm, conv: Weights) -> Tensor:
        """The last norm, SiLU and convolution of a decoder: [1, Y, X, 3]."""
        normal, made = normed(x, norm), []
        for first, last in x.spans:
            made.append(convolved_rows(normal, conv, x.sides[0], first, last))
            x.drop(last - 1)
        return torch.cat(made, 1)


def normed(x: Picture, norm: Norm) -> Rows:
    """The GroupNorm of all of x, with SiLU."""
    tables, counts = [], []
    for strip in x.strips():
        pixels, slab = strip.numel() // strip.shape[-1], max(1, SLAB // strip.shape[-1])
        tables.append(moments(strip, slab))
        counts += [min(slab, pixels - at) for at in range(0, pixels, slab)]
    line = line_of(norm, torch.cat(tables), counts)
    return lambda first, last: line_silu(x.rows(first, last), line)


def line_of(norm: Norm, table: Tensor, counts: list[int]) -> Tensor:
    """Centre, slope and offset [3, C] of a GroupNorm, as `line_silu` takes them.

    table: mean and centred squares of each channel [slabs, 2, C], of `counts` pixels each. They are
    combined in float64, each channel's mean around that of its group.
    """
    count = table.new_tensor(counts, dtype=torch.float64)[:, None]
    total = float(sum(counts))
    means, squares = table.double().unbind(1)
    mean = (means * count).sum(0) / total
    square = (squares + (means - mean).square() * count).sum(0)
    away = mean.view(norm.groups, -1)
    centre = away.mean(1, keepdim=True)
    variance = square.view(norm.groups, -1) / total + (away - centre).square()
    slope = (variance.mean(1, keepdim=True) + norm.eps).rsqrt().expand_as(away).reshape(-1)
    slope = slope * norm.weight.double()
    near = centre.to(table.dtype).double()  # what the kernel subtracts: the rest is in the offset
    rest = (near - centre).expand_as(away).reshape(-1)
    offset = norm.bias.double() + rest * slope
    return torch.stack((near.expand_as(away).reshape(-1), slope, offset)).to(table.dtype)


def convolved_rows(source: Rows, weights: Weights, rows: int, first: int, last: int) -> Tensor:
    """Rows of the 3×3 convolution of a picture that has `rows` of them."""
    above, below = max(0, first - 1), min(rows, last + 1)
    made = convolved(source(above, below), weights).closed()
    return made[:, first - above : last - above]
