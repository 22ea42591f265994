"""Device functions on tiles of pixels for the Triton kernels of `group_norm_silu`.

Each program handles whole groups of one sample as a flat segment of channels, at least 128 bytes of
each row: 8 groups of 10 are 80 channels, in tiles of 64 and 16. Moments are computed per channel,
around a pivot near the channel's mean and never as E[x^2] - E[x]^2; the groups' moments follow from
them. Terms added to whole channels (row, shift) only move the channels' means, so they cost nothing
per pixel.

A kernel is compiled only for what its loops do. Widths, absent vectors, SiLU and the picture of a
segment are run-time arguments, since a pipeline would otherwise compile the kernel again for each.
`flags` say which terms are present; an absent one has an address that is never read.

Names in the kernels: a part is a tile's channels [P] and whether they exist; `missing` is what is
added to each channel and not in its tile yet; moments of channels are a pivot, the mean minus the
pivot, and the centred squares, [P] each. Without a second tile, pairs hold the first one twice.
"""

import triton
import triton.language as tl

from fastdiff.kernels.gelu_gate.gpu import gelu

TABLE = tl.constexpr(16)
"""Slabs whose statistics are combined at a time."""
ROW, SHIFT, RESIDUAL, SILU, KEPT = (tl.constexpr(1 << bit) for bit in range(5))
"""Bits of `flags`: the added terms, SiLU at the end, and whether the sum is written. GELU and
modulation are compiled for."""


@triton.jit
def _part(FIRST: tl.constexpr, P: tl.constexpr, SEGMENT: tl.constexpr):
    """Columns from FIRST on of this program's segment."""
    column = FIRST + tl.arange(0, P)
    return tl.program_id(1) * SEGMENT + column, column < SEGMENT


@triton.jit
def opened(
    x_ptr, row_ptr, residual_ptr, beside_ptr, shift_ptr, sum_ptr, sample, start, L, C, C2,
    beside_batch, row_stride, flags, ALIGN: tl.constexpr, SEGMENT: tl.constexpr,
    BORDER: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
):  # fmt: skip
    """The addresses of a sample's rows from `start` on, the terms added to channels, both parts,
    and C + C2.

    Without a BORDER in its segment a program reads only one picture, x or `beside`. Channels and
    the row stride are multiples of ALIGN; dividing and multiplying by it lets the compiler know.
    """
    C, C2, row_stride = C // ALIGN * ALIGN, C2 // ALIGN * ALIGN, row_stride // ALIGN * ALIGN
    first = (sample * L + start) * C
    beside_ptr += ((tl.program_id(2) % beside_batch).to(tl.int64) * L + start) * C2 - C
    x_ptr += first
    stride = C
    if not BORDER:
        if tl.program_id(1) * SEGMENT >= C:
            x_ptr = beside_ptr
            stride = C2
        stride = stride // ALIGN * ALIGN
    sum_ptr += (sample * L + start) * (C + C2)
    source = x_ptr, residual_ptr + first, beside_ptr, sum_ptr, stride, C, C2, BORDER
    part0 = _part(0, P0, SEGMENT)
    part1 = part0
    if P1 > 0:
        part1 = _part(P0, P1, SEGMENT)
    return source, (row_ptr + sample * row_stride, shift_ptr, C, flags), (part0, part1), C + C2


@triton.jit
def _added(vectors, part):
    """row + shift of each channel; zero for those of `beside`."""
    row_ptr, shift_ptr, C, flags = vectors
    channels, exists = part
    own = exists & (channels < C)
    row, shift = own & (channels < (flags & ROW) * C), own & (channels < (flags & SHIFT) * C)
    added = tl.load(row_ptr + channels, mask=row, other=0.0).to(tl.float32)
    return added + tl.load(shift_ptr + channels, mask=shift, other=0.0)


@triton.jit
def added_of(vectors, parts, P1: tl.constexpr):
    added0 = _added(vectors, parts[0])
    added1 = added0
    if P1 > 0:
        added1 = _added(vectors, parts[1])
    return added0, added1


@triton.jit
def missing_of(vectors, parts, SUMMED: tl.constexpr, P1: tl.constexpr):
    """What is added to each channel of the tiles and not in them yet."""
    row_ptr, shift_ptr, C, flags = vectors
    if SUMMED:
        flags = 0
    return added_of((row_ptr, shift_ptr, C, flags), parts, P1)


@triton.jit
def _tile(source, part, rows, end):
    """Pixels [ROWS, P] as they are in memory, zero outside."""
    x_ptr, _, beside_ptr, _, stride, C, C2, BORDER = source
    channels, exists = part
    inside = ((rows >= 0) & (rows < end))[:, None] & exists[None, :]
    offsets = rows[:, None] * stride + channels[None, :]
    if BORDER:  # the compiler finds 16-byte loads with masks, not with such addresses
        others = beside_ptr + (rows[:, None] * C2 + channels[None, :])
        other = tl.load(others, mask=inside & (channels >= C)[None, :], other=0.0)
        tile = tl.load(x_ptr + offsets, mask=inside & (channels < C)[None, :], other=0.0)
        tile = tl.where((channels < C)[None, :], tile, other)
    else:
        tile = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    return tile


@triton.jit
def sum_tile(tile, source, added, part, rows, end, flags):
    """The pixels of x + added + residual, and those of `beside`; both are also written."""
    _, residual_ptr, _, sum_ptr, stride, C, C2, _ = source
    channels, exists = part
    inside = ((rows >= 0) & (rows < end))[:, None]
    own = inside & (exists & (channels < C) & (channels < (flags & RESIDUAL) * C))[None, :]
    total = tile.to(tl.float32) + added[None, :]
    offsets = rows[:, None] * stride + channels[None, :]
    total += tl.load(residual_ptr + offsets, mask=own, other=0.0).to(tl.float32)
    inside = inside & exists[None, :]
    total = tl.where(inside, total, 0.0).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + (rows[:, None] * (C + C2) + channels[None, :]), total, mask=inside)
    return total.to(tile.dtype)


@triton.jit
def sums_of(source):
    """The source of the sums that `sum_tile` has written."""
    _, residual_ptr, beside_ptr, sum_ptr, _, C, C2, _ = source
    return sum_ptr, residual_ptr, beside_ptr, sum_ptr, C + C2, C, C2, False


@triton.jit
def load_tiles(source, added, parts, rows, end, flags, P1: tl.constexpr):
    """Both tiles; with `added`, those of the sums."""
    tile0 = _tile(source, parts[0], rows, end)
    if added is not None:
        tile0 = sum_tile(tile0, source, added[0], parts[0], rows, end, flags)
    tile1 = tile0
    if P1 > 0:
        tile1 = _tile(source, parts[1], rows, end)
        if added is not None:
            tile1 = sum_tile(tile1, source, added[1], parts[1], rows, end, flags)
    return tile0, tile1


@triton.jit
def merge(mean, square, count, more_mean, more_square, share):
    """Chan's update of means and centred squares [ROWS, P] of `count` values each by further
    values, which are then a `share` [ROWS, 1] of all."""
    step = more_mean - mean
    square += step * step * (count * share)
    if more_square is not None:
        square += more_square
    return mean + step * share, square


@triton.jit
def moments_of(mean, square, count, all_count):
    """Moments of channels from means and centred squares [ROWS, P] of `count` [ROWS, 1] values
    each. Without squares the means are single pixels, zero where there are none."""
    pivot = tl.sum(mean if square is None else mean * count, 0) / all_count
    centred = mean - pivot[None, :]
    weighted = centred * count
    drift = tl.sum(weighted, 0) / all_count
    squares = centred * weighted
    if square is not None:
        squares += square
    return pivot, drift, tl.sum(squares, 0) - drift * drift * all_count


@triton.jit
def keep(statistics_ptr, mean, square, count, missing, length, part, C):
    """Store mean and centred squares of a tile's channels for a slab."""
    pivot, drift, square = moments_of(mean, square, count, length)
    tl.store(statistics_ptr + part[0], pivot + (drift + missing), mask=part[1])
    tl.store(statistics_ptr + C + part[0], square, mask=part[1])


@triton.jit
def recall(statistics_ptr, slabs, slab_rows, L, C, missing, part, P: tl.constexpr):
    """Moments of a tile's channels, from those of all slabs, TABLE of them at a time."""
    channels, exists = part
    count = tl.zeros((TABLE, 1), tl.float32)
    mean = tl.zeros((TABLE, P), tl.float32)
    square = mean
    for first in range(0, slabs, TABLE):
        slab = first + tl.arange(0, TABLE)
        more = tl.maximum(tl.minimum(slab_rows, L - slab * slab_rows), 0)[:, None]
        inside = (more > 0) & exists[None, :]
        pointers = statistics_ptr + (slab[:, None] * 2 * C + channels[None, :])
        more_mean = tl.load(pointers, mask=inside, other=0.0)
        more_square = tl.load(pointers + C, mask=inside, other=0.0)
        more = more.to(tl.float32)
        share = more / tl.maximum(count + more, 1.0)
        mean, square = merge(mean, square, count, more_mean, more_square, share)
        count += more
    pivot, drift, square = moments_of(mean, square, count, 1.0 * L)
    return pivot - missing, drift, square


@triton.jit
def _group(part, W, SEGMENT: tl.constexpr):
    """The index in the segment of each channel's group of W channels, [P]; beyond the segment, the
    last group's. Rounding the quotient of small integers plus a half gives the exact integer, and
    avoids an integer division."""
    column = tl.minimum(part[0] - tl.program_id(1) * SEGMENT, SEGMENT - 1)
    return ((column + 0.5) * (1.0 / W)).to(tl.int32)


@triton.jit
def _sums(value, part, group, GROUPS: tl.constexpr):
    """The sum over the channels [P] of each group: [GROUPS]."""
    member = (group[None, :] == tl.arange(0, GROUPS)[:, None]) & part[1][None, :]
    return tl.sum(tl.where(member, value[None, :], 0.0), 1)


@triton.jit
def _line(affine, part, centre, shift, rstd, group):
    """Slope and offset of each channel."""
    weight_ptr, bias_ptr, scale_ptr, channels = affine
    slope = tl.load(weight_ptr + part[0], mask=part[1], other=0.0).to(tl.float32)
    slope *= tl.gather(rstd, group, 0)
    bias = tl.load(bias_ptr + part[0], mask=part[1], other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = 1.0 + tl.load(scale_ptr + part[0], mask=part[1], other=0.0).to(tl.float32)
        slope *= scale
        offset_ptr = scale_ptr + channels
        bias = bias * scale + tl.load(offset_ptr + part[0], mask=part[1], other=0.0).to(tl.float32)
    return slope, bias + (centre - tl.gather(shift, group, 0)) * slope


@triton.jit
def lines_of(
    affine, parts, missing, moments0, moments1, L, W, eps,
    SEGMENT: tl.constexpr, GROUPS: tl.constexpr, P1: tl.constexpr,
):  # fmt: skip
    """(pivot, slope, offset) of each channel in y = (tile - pivot) * slope + offset. A group has W
    channels, a segment at most GROUPS groups; eps: the bits of a float32; affine: the addresses of
    weight, bias and the sample's scale_shift (or None), and C + C2."""
    part0, part1 = parts
    group0, group1 = _group(part0, W, SEGMENT), _group(part1, W, SEGMENT)
    pivot0, drift0, square0 = moments0
    pivot1, drift1, square1 = moments1
    missing0, missing1 = missing
    mean = _sums(pivot0 + missing0, part0, group0, GROUPS)
    if P1 > 0:
        mean += _sums(pivot1 + missing1, part1, group1, GROUPS)
    mean /= W
    # gathering keeps the two tiles' layouts apart: with sums of masked [N, P] instead, the compiler
    # gave the wider tile the other one's layout and moved it through shared memory
    centre0 = pivot0 - tl.gather(mean, group0, 0) + missing0
    away0 = centre0 + drift0
    shift = _sums(away0, part0, group0, GROUPS)
    variance = _sums(square0 + away0 * away0 * L, part0, group0, GROUPS)
    centre1 = centre0
    if P1 > 0:
        centre1 = pivot1 - tl.gather(mean, group1, 0) + missing1
        away1 = centre1 + drift1
        shift += _sums(away1, part1, group1, GROUPS)
        variance += _sums(square1 + away1 * away1 * L, part1, group1, GROUPS)
    shift /= W
    variance = variance / (L * W) - shift * shift
    rstd = 1.0 / tl.sqrt_rn(tl.maximum(variance, 0.0) + eps.to(tl.float32, bitcast=True))
    slope0, offset0 = _line(affine, part0, centre0, shift, rstd, group0)
    slope1, offset1 = slope0, offset0
    if P1 > 0:
        slope1, offset1 = _line(affine, part1, centre1, shift, rstd, group1)
    return (pivot0, slope0, offset0), (pivot1, slope1, offset1)


@triton.jit
def _finish(out_ptr, tile, line, part, rows, end, C, SILU: tl.constexpr, GELU: tl.constexpr):
    channels, exists = part
    pivot, slope, offset = line
    y = (tile.to(tl.float32) - pivot[None, :]) * slope[None, :] + offset[None, :]
    if GELU:
        y = gelu(y)
    elif SILU:
        y = y * tl.sigmoid(y)
    inside = (rows < end)[:, None] & exists[None, :]
    tl.store(out_ptr + (rows[:, None] * C + channels[None, :]), y, mask=inside)


@triton.jit
def store_tile(out_ptr, tile, line, part, rows, end, C, flags, GELU: tl.constexpr):
    """out = (tile - pivot) * slope + offset, its silu or its gelu. The branch is around everything:
    around SiLU alone it would keep a whole tile of float32 in registers."""
    if GELU:
        _finish(out_ptr, tile, line, part, rows, end, C, False, True)
    elif flags & SILU != 0:
        _finish(out_ptr, tile, line, part, rows, end, C, True, False)
    else:
        _finish(out_ptr, tile, line, part, rows, end, C, False, False)
