"""What the Triton kernels of `group_norm_silu` do with a tile of pixels.

A program handles whole groups of one sample as a flat segment of channels, at least 128 bytes of
each row: 8 groups of 10 are 80 channels, tiles of 64 and 16. Moments are those of channels, around
a pivot near their mean and never as E[x^2] - E[x]^2; those of groups follow from them. What is
added to whole channels (row, shift) moves their means only, so no pixel pays for it.

Names in the kernels: a part is a tile's channels [P], whether they exist, and row + shift of each;
moments of channels are a pivot, the mean less it, and the centred squares, [P] each. Without a
second tile the second of a pair is the first again.
"""

import triton
import triton.language as tl


@triton.jit
def _part(
    row_ptr, shift_ptr, C,
    FIRST: tl.constexpr, P: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Columns FIRST.. of this program's segment; nothing is added to the channels of `beside`."""
    column = FIRST + tl.arange(0, P)
    exists = column < SEGMENT
    channels = tl.program_id(1) * SEGMENT + column
    added = tl.zeros((P,), tl.float32)
    if row_ptr is not None:
        added += tl.load(row_ptr + channels, mask=exists & (channels < C), other=0.0)
    if shift_ptr is not None:
        added += tl.load(shift_ptr + channels, mask=exists & (channels < C), other=0.0)
    return channels, exists, added


@triton.jit
def parts_of(
    row_ptr, shift_ptr, sample, row_stride, C,
    SEGMENT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
):  # fmt: skip
    if row_ptr is not None:
        row_ptr += sample * row_stride
    part0 = _part(row_ptr, shift_ptr, C, 0, P0, SEGMENT)
    part1 = part0
    if P1 > 0:
        part1 = _part(row_ptr, shift_ptr, C, P0, P1, SEGMENT)
    return part0, part1


@triton.jit
def bases_of(sample, start, L, C, C2, beside_batch):
    """Offsets of the rows from `start` of a sample, in x and in `beside`."""
    return (sample * L + start) * C, (sample % beside_batch * L + start) * C2


@triton.jit
def _tile(source, part, rows, end):
    """Pixels [ROWS, P] as they are in memory, zero outside; with a residual x + added + residual,
    which is also written."""
    x_ptr, residual_ptr, beside_ptr, sum_ptr, bases, C, C2 = source
    channels, exists, added = part
    inside = ((rows >= 0) & (rows < end))[:, None] & exists[None, :]
    offsets = rows[:, None] * C + channels[None, :]
    if beside_ptr is None:
        tile = tl.load(x_ptr + bases[0] + offsets, mask=inside, other=0.0)
    else:  # of a border within a tile, the compiler sees 16 bytes in masks, not in addresses
        others = beside_ptr + bases[1] + (rows[:, None] * C2 + (channels - C)[None, :])
        other = tl.load(others, mask=inside & (channels >= C)[None, :], other=0.0)
        tile = tl.load(x_ptr + bases[0] + offsets, mask=inside & (channels < C)[None, :], other=0.0)
        tile = tl.where((channels < C)[None, :], tile, other)
    if residual_ptr is not None:
        inside &= (channels < C)[None, :]
        total = tile.to(tl.float32) + added[None, :]
        total += tl.load(residual_ptr + bases[0] + offsets, mask=inside, other=0.0).to(tl.float32)
        tile = tl.where(inside, total, tile.to(tl.float32)).to(tile.dtype)
        tl.store(sum_ptr + bases[0] + offsets, tile, mask=inside)
    return tile


@triton.jit
def load_tiles(source, parts, rows, end, P1: tl.constexpr):
    tile0 = _tile(source, parts[0], rows, end)
    tile1 = tile0
    if P1 > 0:
        tile1 = _tile(source, parts[1], rows, end)
    return tile0, tile1


@triton.jit
def missing_of(source, part):
    """What is added to a channel and not in its tile yet."""
    return part[2] if source[1] is None else tl.zeros_like(part[2])


@triton.jit
def merge(mean, square, count, more_mean, more_square, share):
    """Chan's update of means and centred squares [ROWS, P] of `count` values each by more, that are
    a `share` [ROWS, 1] of all then."""
    step = more_mean - mean
    square += step * step * (count * share)
    if more_square is not None:
        square += more_square
    return mean + step * share, square


@triton.jit
def moments_of(mean, square, count, all_count):
    """Moments of channels from means and centred squares [ROWS, P] of `count` [ROWS, 1] values
    each. Without squares these are single pixels, zero where there are none."""
    pivot = tl.sum(mean if square is None else mean * count, 0) / all_count
    centred = mean - pivot[None, :]
    weighted = centred * count
    drift = tl.sum(weighted, 0) / all_count
    squares = centred * weighted
    if square is not None:
        squares += square
    return pivot, drift, tl.sum(squares, 0) - drift * drift * all_count


@triton.jit
def _group(part, SEGMENT: tl.constexpr, N: tl.constexpr):
    """The group within the segment of each channel, [P]; of those beyond it the last."""
    column = part[0] - tl.program_id(1) * SEGMENT
    return tl.minimum(column // (SEGMENT // N), N - 1)


@triton.jit
def _sums(value, part, group, N: tl.constexpr):
    """Of the channels [P] of each group: [N], N rounded up."""
    ROUND: tl.constexpr = triton.next_power_of_2(N)
    member = (group[None, :] == tl.arange(0, ROUND)[:, None]) & part[1][None, :]
    return tl.sum(tl.where(member, value[None, :], 0.0), 1)


@triton.jit
def _line(weight_ptr, bias_ptr, part, centre, shift, rstd, group):
    """Slope and offset of each channel."""
    slope = tl.load(weight_ptr + part[0], mask=part[1], other=0.0).to(tl.float32)
    slope *= tl.gather(rstd, group, 0)
    bias = tl.load(bias_ptr + part[0], mask=part[1], other=0.0).to(tl.float32)
    return slope, bias + (centre - tl.gather(shift, group, 0)) * slope


@triton.jit
def lines_of(
    weight_ptr, bias_ptr, source, parts, moments0, moments1, L,
    EPS: tl.constexpr, SEGMENT: tl.constexpr, N: tl.constexpr, P1: tl.constexpr,
):  # fmt: skip
    """Of each channel (pivot, slope, offset) in y = (tile - pivot) * slope + offset."""
    W: tl.constexpr = SEGMENT // N
    part0, part1 = parts
    group0, group1 = _group(part0, SEGMENT, N), _group(part1, SEGMENT, N)
    pivot0, drift0, square0 = moments0
    pivot1, drift1, square1 = moments1
    missing0, missing1 = missing_of(source, part0), missing_of(source, part1)
    mean = _sums(pivot0 + missing0, part0, group0, N)
    if P1 > 0:
        mean += _sums(pivot1 + missing1, part1, group1, N)
    mean /= W
    # gathering keeps the layouts of the two tiles apart: with sums of masked [N, P] instead, the
    # compiler gave the wider tile the layout of the other one and moved it through shared memory
    centre0 = pivot0 - tl.gather(mean, group0, 0) + missing0
    away0 = centre0 + drift0
    shift = _sums(away0, part0, group0, N)
    variance = _sums(square0 + away0 * away0 * L, part0, group0, N)
    centre1 = centre0
    if P1 > 0:
        centre1 = pivot1 - tl.gather(mean, group1, 0) + missing1
        away1 = centre1 + drift1
        shift += _sums(away1, part1, group1, N)
        variance += _sums(square1 + away1 * away1 * L, part1, group1, N)
    shift /= W
    variance = variance / (L * W) - shift * shift
    rstd = 1.0 / tl.sqrt_rn(tl.maximum(variance, 0.0) + EPS)
    slope0, offset0 = _line(weight_ptr, bias_ptr, part0, centre0, shift, rstd, group0)
    slope1, offset1 = slope0, offset0
    if P1 > 0:
        slope1, offset1 = _line(weight_ptr, bias_ptr, part1, centre1, shift, rstd, group1)
    return (pivot0, slope0, offset0), (pivot1, slope1, offset1)


@triton.jit
def store_tile(out_ptr, tile, line, part, rows, end, C, SILU: tl.constexpr):
    """out = silu((tile - pivot) * slope + offset)."""
    channels, exists, _ = part
    pivot, slope, offset = line
    y = (tile.to(tl.float32) - pivot[None, :]) * slope[None, :] + offset[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    inside = (rows < end)[:, None] & exists[None, :]
    tl.store(out_ptr + (rows[:, None] * C + channels[None, :]), y, mask=inside)
