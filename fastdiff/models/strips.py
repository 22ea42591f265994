"""A decoder's pictures in strips of rows: the same picture, up to rounding, in less memory.

A picture here is made when somebody asks for rows of it. A convolution asks for a row more above
and below; so one asks the other, down to a picture whose strips lie in memory. A GroupNorm needs
the moments of the whole, so it is a pass over all strips that keeps only these; the next pass makes
the rows again, or finds those that were kept because there was room.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdiff.kernels.conv2d import conv2d
from fastdiff.kernels.line_silu import line_silu
from fastdiff.kernels.moments import moments
from fastdiff.models.blocks import Resnet, Up
from fastdiff.models.borrow import Norm, Weights
from fastdiff.models.sums import Sum

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
    """The last rows that were asked for and made, and the first of them: the next strip needs those
    at the border, a branch and the way around it the same."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First row of each strip, and the one after it."""
        rows = self.sides[0]
        return [(row, min(row + self.height, rows)) for row in range(0, rows, self.height)]

    def rows(self, first: int, last: int) -> Tensor:
        """As `Rows`."""
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
        """All, from above. Those that are made are kept until one finds no room."""
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
        unkept = (
            max(row, f) for f, end in self.spans if end > row and f // self.height not in self._kept
        )
        self.spare(next(unkept, self.sides[0]))

    def _made(self, first: int, last: int) -> Tensor:
        if self.make is None:
            raise AssertionError(f"rows {first} to {last} were dropped")
        return self.make(first, last)


class Strips:
    """Pictures that take `bytes` at once.

    A twelfth of them is for the strip that is being worked on, whose rows need what a whole picture
    needs for each of its rows. The rest is for strips that are kept.
    """

    def __init__(self, bytes: int) -> None:
        self._working = bytes // 12
        self.room = Room(bytes - self._working)

    def height(self, row: int) -> int:
        """Rows of a strip, of which one takes `row` bytes while it is worked on."""
        return max(1, self._working // row)

    def held(self, x: Sum | Picture, row: int) -> Picture:
        """A picture [1, Y, X, C] that is there, in strips; `row` as of `height`, here and below."""
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
            source = x.rows(above, below)
            size = (2 * source.shape[1], 2 * source.shape[2])
            made = conv2d(source, up.conv.weight, up.conv.bias, size=size)
            return made[:, first - 2 * above : last - 2 * above]

        def spare(row: int) -> None:
            x.drop(x.sides[0] if row == sides[0] else row // 2 - 1)

        sides = (2 * x.sides[0], 2 * x.sides[1])
        return Picture(sides, self.height(row), self.room, make, spare)

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

        def end_of(first: int, last: int) -> Tensor:
            around, conv = block.around(x.rows(first, last)), block.conv2
            return conv2d(branch2(first, last), conv.weight, conv.bias, residual=around)

        out = Picture(x.sides, height, self.room)
        for first, last in out.spans:
            above, below = max(0, first - 1), min(rows, last + 1)
            x.rows(max(0, above - 1), min(rows, below + 1))  # for both, the branch and around it
            out.keep(first, end_of(above, below)[:, first - above : last - above])
            end = last == rows
            h.drop(rows if end else last - 1)
            x.drop(rows if end else last - 2)
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
    found = []
    for strip in x.strips():
        pixels, slab = strip.numel() // strip.shape[-1], max(1, SLAB // strip.shape[-1])
        counts = [min(slab, pixels - at) for at in range(0, pixels, slab)]
        mean, rest, square = moments(strip, slab).double().unbind(1)
        found.append((pixels, *combined(mean + rest, square, counts)))
        dtype = strip.dtype
        del strip  # before the next is made
    pixels_of, means, squares = zip(*found, strict=True)
    mean, square = combined(torch.stack(means), torch.stack(squares), pixels_of)
    line = line_of(norm, mean, square / sum(pixels_of))
    line = line if dtype == torch.float64 else line.float()
    return lambda first, last: line_silu(x.rows(first, last), line)


def combined(means: Tensor, squares: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and centred squares [C] of samples together, of means and squares [samples, C] of
    `counts` values each (Chan et al., 1979)."""
    count = means.new_tensor(counts)[:, None]
    mean = (means * count).sum(0) / sum(counts)
    return mean, (squares + (means - mean).square() * count).sum(0)


def line_of(norm: Norm, mean: Tensor, variance: Tensor) -> Tensor:
    """Centre, slope and offset [3, C] of a GroupNorm, in float64: of mean and variance [C] of each
    channel. The centre is a float32, what that misses of the group's mean is in the offset."""
    grouped = mean.view(norm.groups, -1)
    exact = grouped.mean(1, keepdim=True)
    spread = variance.view(norm.groups, -1) + (grouped - exact).square()
    deviation = (spread.mean(1, keepdim=True) + norm.eps).sqrt()
    exact, deviation = (t.expand_as(grouped).reshape(-1) for t in (exact, deviation))
    centre, slope = exact.float().double(), norm.weight.double() / deviation
    return torch.stack((centre, slope, norm.bias.double() + (centre - exact) * slope))


def convolved_rows(source: Rows, weights: Weights, rows: int, first: int, last: int) -> Tensor:
    """Rows of the 3×3 convolution of a picture that has `rows` of them."""
    above, below = max(0, first - 1), min(rows, last + 1)
    made = conv2d(source(above, below), weights.weight, weights.bias)
    return made[:, first - above : last - above]
