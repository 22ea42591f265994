"""Triton implementation of `group_norm_silu`: once over memory where a group fits in registers.

Else two kernels: partial statistics of each slab of rows, then their combination and the
normalisation, in reverse order so that what the first kernel read last is still in L2.
A program handles whole groups of one sample as tiles [rows, groups, width]; a width that is no
power of two is two tiles (10 = 8 + 2), not one padded tile. Statistics are in fp32, squares taken
around a pivot near the mean, never as E[x^2] - E[x]^2.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.contract import Launch, Launcher, power_parts


@triton.jit
def _place(rows, end, C, W: tl.constexpr, FIRST: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """The tile of columns FIRST.. of N groups: channels [N, P], whether they exist [1, P],
    offsets [ROWS, N, P], whether those exist [ROWS, 1, P]."""
    column = FIRST + tl.arange(0, P)[None, :]
    channels = tl.arange(0, N)[:, None] * W + column
    exists = column < W
    offsets = rows[:, None, None] * C + channels[None, :, :]
    return channels, exists, offsets, (rows < end)[:, None, None] & exists[None, :, :]


@triton.jit
def _read(x_ptr, row_ptr, residual_ptr, sum_ptr, place):
    """x + row + residual in fp32, zero outside; writes the sum where there is a residual."""
    channels, exists, offsets, inside = place
    total = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if row_ptr is not None:
        total += tl.load(row_ptr + channels, mask=exists, other=0.0).to(tl.float32)[None, :, :]
    if residual_ptr is not None:
        total += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_ptr + offsets, total, mask=inside)
    return tl.where(inside, total, 0.0)


@triton.jit
def _write(out_ptr, total, pivot, shift, rstd, weight_ptr, bias_ptr, place, SILU: tl.constexpr):
    """out = silu((total - pivot - shift) * rstd * weight + bias)."""
    channels, exists, offsets, inside = place
    scale = tl.load(weight_ptr + channels, mask=exists, other=0.0).to(tl.float32) * rstd[:, None]
    bias = tl.load(bias_ptr + channels, mask=exists, other=0.0).to(tl.float32)
    bias -= shift[:, None] * scale
    y = (total - pivot[None, :, None]) * scale[None, :, :] + bias[None, :, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out_ptr + offsets, y, mask=inside)


@triton.jit
def _per_group(tile):
    return tl.sum(tl.sum(tile, 2), 0)


@triton.jit
def _combine(mean, square, count, all_count):
    """Chan's formula: means and centred squares of parts [ROWS, N, P] to those of each group,
    the mean as pivot + shift because their sum may round."""
    pivot = _per_group(mean * count) / all_count
    centred = mean - pivot[None, :, None]
    shift = _per_group(centred * count) / all_count
    return pivot, shift, _per_group(square + centred * centred * count) - shift * shift * all_count


@triton.jit
def _one_pass_kernel(
    x_ptr, weight_ptr, bias_ptr, row_ptr, residual_ptr, L, C, row_stride, sum_ptr, out_ptr,
    EPS: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program normalises N groups of one sample, held in registers."""
    first = tl.program_id(0) * N * W
    sample = tl.program_id(1).to(tl.int64)
    base = sample * L * C + first
    x_ptr += base
    if row_ptr is not None:
        row_ptr += sample * row_stride + first
    if residual_ptr is not None:
        residual_ptr += base
        sum_ptr += base
    rows = tl.arange(0, ROWS)
    place0 = _place(rows, L, C, W, 0, P0, N)
    total0 = _read(x_ptr, row_ptr, residual_ptr, sum_ptr, place0)
    pivot = _per_group(total0)
    if P1 > 0:
        place1 = _place(rows, L, C, W, P0, P1, N)
        total1 = _read(x_ptr, row_ptr, residual_ptr, sum_ptr, place1)
        pivot += _per_group(total1)
    count = 1.0 * L * W
    pivot /= count
    centred = tl.where(place0[3], total0 - pivot[None, :, None], 0.0)
    shift = _per_group(centred)
    square = _per_group(centred * centred)
    if P1 > 0:
        centred = tl.where(place1[3], total1 - pivot[None, :, None], 0.0)
        shift += _per_group(centred)
        square += _per_group(centred * centred)
    shift /= count
    rstd = 1.0 / tl.sqrt_rn(tl.maximum(square / count - shift * shift, 0.0) + EPS)
    out_ptr += base
    weight_ptr += first
    bias_ptr += first
    _write(out_ptr, total0, pivot, shift, rstd, weight_ptr, bias_ptr, place0, SILU)
    if P1 > 0:
        _write(out_ptr, total1, pivot, shift, rstd, weight_ptr, bias_ptr, place1, SILU)


@triton.jit
def _slab_part(
    x_ptr, row_ptr, residual_ptr, sum_ptr, statistics_ptr, length, C, G,
    W: tl.constexpr, FIRST: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr,
    N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Welford's update for each element of the tile over the slab's rows, then one combination."""
    mean = tl.zeros((ROWS, N, P), tl.float32)
    square = tl.zeros((ROWS, N, P), tl.float32)
    count = tl.zeros((ROWS, 1, P), tl.float32)
    for start in range(0, length, ROWS):
        place = _place(start + tl.arange(0, ROWS), length, C, W, FIRST, P, N)
        total = _read(x_ptr, row_ptr, residual_ptr, sum_ptr, place)
        count += place[3].to(tl.float32)
        before = total - mean
        mean += tl.where(place[3], before / (start // ROWS + 1), 0.0)
        square += tl.where(place[3], before * (total - mean), 0.0)
    pivot, shift, square_sum = _combine(mean, square, count, length.to(tl.float32) * WIDTH)
    tl.store(statistics_ptr + tl.arange(0, N), pivot + shift)
    tl.store(statistics_ptr + G + tl.arange(0, N), square_sum)


@triton.jit
def _statistics_kernel(
    x_ptr, row_ptr, residual_ptr, L, C, row_stride, G, slab_rows, sum_ptr, statistics_ptr,
    W: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean and centred squares of a slab's groups: statistics [B, slabs, parts, 2, G]."""
    PARTS: tl.constexpr = 2 if P1 > 0 else 1
    start = tl.program_id(0) * slab_rows
    length = tl.minimum(slab_rows, L - start)
    first = tl.program_id(1) * N * W
    sample = tl.program_id(2).to(tl.int64)
    base = (sample * L + start) * C + first
    x_ptr += base
    if row_ptr is not None:
        row_ptr += sample * row_stride + first
    if residual_ptr is not None:
        residual_ptr += base
        sum_ptr += base
    slab = sample * tl.num_programs(0) + tl.program_id(0)
    statistics_ptr += slab * PARTS * 2 * G + tl.program_id(1) * N
    _slab_part(
        x_ptr, row_ptr, residual_ptr, sum_ptr, statistics_ptr, length, C, G,
        W, 0, P0, P0 if P1 > 0 else W, N, ROWS,
    )  # fmt: skip
    if P1 > 0:
        _slab_part(
            x_ptr, row_ptr, residual_ptr, sum_ptr, statistics_ptr + 2 * G, length, C, G,
            W, P0, P1, W - P0, N, ROWS,
        )  # fmt: skip


@triton.jit
def _apply_kernel(
    x_ptr, weight_ptr, bias_ptr, row_ptr, statistics_ptr, L, C, row_stride, G, slab_rows, out_ptr,
    EPS: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    N: tl.constexpr, ROWS: tl.constexpr, SLABS: tl.constexpr,
):  # fmt: skip
    """Combine the statistics of all slabs and normalise one slab, the last rows first."""
    PARTS: tl.constexpr = 2 if P1 > 0 else 1
    slabs = tl.num_programs(0)
    first = tl.program_id(1) * N * W
    sample = tl.program_id(2).to(tl.int64)
    index = tl.arange(0, SLABS * PARTS)
    slab = index // PARTS
    width = tl.where(index % PARTS > 0, W - P0, P0 if P1 > 0 else W)
    count = tl.where(slab < slabs, tl.minimum(slab_rows, L - slab * slab_rows) * width, 0)
    statistics_ptr += sample * slabs * PARTS * 2 * G + tl.program_id(1) * N
    pointers = statistics_ptr + index[:, None] * 2 * G + tl.arange(0, N)[None, :]
    mean = tl.load(pointers, mask=(slab < slabs)[:, None], other=0.0)[:, :, None]
    square = tl.load(pointers + G, mask=(slab < slabs)[:, None], other=0.0)[:, :, None]
    all_count = 1.0 * L * W  # L = 1 is a constant
    pivot, shift, square_sum = _combine(
        mean, square, count.to(tl.float32)[:, None, None], all_count
    )
    rstd = 1.0 / tl.sqrt_rn(tl.maximum(square_sum / all_count, 0.0) + EPS)

    start = (slabs - 1 - tl.program_id(0)) * slab_rows
    length = tl.minimum(slab_rows, L - start)
    x_ptr += (sample * L + start) * C + first
    out_ptr += (sample * L + start) * C + first
    weight_ptr += first
    bias_ptr += first
    if row_ptr is not None:
        row_ptr += sample * row_stride + first
    for back in range(0, length, ROWS):
        rows = (length - 1) // ROWS * ROWS - back + tl.arange(0, ROWS)
        place = _place(rows, length, C, W, 0, P0, N)
        total = _read(x_ptr, row_ptr, None, None, place)
        _write(out_ptr, total, pivot, shift, rstd, weight_ptr, bias_ptr, place, SILU)
        if P1 > 0:
            place = _place(rows, length, C, W, P0, P1, N)
            total = _read(x_ptr, row_ptr, None, None, place)
            _write(out_ptr, total, pivot, shift, rstd, weight_ptr, bias_ptr, place, SILU)


@dataclass(frozen=True)
class LaunchConfig:
    """Groups of a program, rows of a tile, slabs of a sample (0: one pass), warps."""

    groups: int
    rows: int
    slabs: int
    num_warps: int


ONE_PASS_WARPS = {1024: 1, 4096: 4, 16384: 8, 20480: 16}
"""Warps by the most elements of a tile, 32 to 64 fp32 values a thread: 32^2 rows of 20 channels are
the last that fit; 40960 elements spill at 16 warps and at 32."""
SEGMENTS = (64, 32)  # bytes of a row in a program: two sectors, at least one
SLAB_TILE = 4096  # elements of a tile of the two slab kernels, 8 warps
INTERPRETED_TILE = 65536  # the interpreter takes its time for an operation, not for its size
MOST_SLABS = 512  # each program of the second kernel reads the statistics of all of them
SLAB_PROGRAMS = 528  # four for each SM of an H100; the interpreter's are 64


def pick(B: int, L: int, W: int, G: int, size: int, arch: int) -> LaunchConfig:
    """Launch of B samples of L pixels in G groups of W channels of `size` bytes."""
    divisors = [n for n in (1, 2, 4, 8, 16, 32) if G % n == 0]
    wide = [next((n for n in divisors if n * W * size >= s), divisors[-1]) for s in SEGMENTS]
    width, rows = sum(power_parts(W)), triton.next_power_of_2(L)
    for groups in wide:
        for most, num_warps in ONE_PASS_WARPS.items():
            if rows * groups * width <= most:
                return LaunchConfig(groups, rows, 0, num_warps)
    groups = wide[0]
    tile, programs = (SLAB_TILE, SLAB_PROGRAMS) if arch else (INTERPRETED_TILE, 64)
    rows = max(1, tile // triton.next_power_of_2(groups * width))
    slabs = min(MOST_SLABS, triton.cdiv(programs, B * (G // groups)), triton.cdiv(L, rows))
    return LaunchConfig(groups, rows, slabs, 8)


def plan(
    arch: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    row: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[tuple[Launch, ...], tuple[Tensor, Tensor]]:
    """The launches for x [B, Y, X, C] and what they write: the result and the sum (or empty)."""
    B, Y, X, C = x.shape
    L, W = Y * X, C // groups
    if not x.is_contiguous() or not (residual is None or residual.is_contiguous()):
        raise ValueError("group_norm_silu: x and residual must be contiguous [B, Y, X, C]")
    if row is not None and row.stride(1) != 1:
        raise ValueError(f"group_norm_silu: row has strides {row.stride()}; the last must be 1")
    sizes = {"L": L, "C": C, "row_stride": 0 if row is None else row.stride(0)}
    out = torch.empty_like(x)
    total = torch.empty_like(x) if residual is not None else x.new_empty(0)
    config = pick(B, L, W, groups, x.element_size(), arch)
    P0, P1 = power_parts(W)
    tile: dict[str, Any] = {"W": W, "P0": P0, "P1": P1, "N": config.groups, "ROWS": config.rows}
    parameters = {"weight_ptr": weight, "bias_ptr": bias, "row_ptr": row}
    written = {"sum_ptr": total if residual is not None else None}
    finish: dict[str, Any] = {"EPS": eps, "SILU": silu} | tile
    blocks = groups // config.groups
    if not config.slabs:
        arguments = {"x_ptr": x} | parameters | {"residual_ptr": residual} | sizes
        arguments |= written | {"out_ptr": out}
        launch = Launch(_one_pass_kernel, arguments, finish, (blocks, B), config.num_warps)
        return (launch,), (out, total)
    slab_rows = triton.cdiv(L, config.slabs)
    slabs = triton.cdiv(L, slab_rows)  # fewer than asked for rather than an empty one
    statistics = x.new_empty((B, slabs, 2 if P1 else 1, 2, groups), dtype=torch.float32)
    sizes |= {"G": groups, "slab_rows": slab_rows}
    grid = (slabs, blocks, B)
    first = {"x_ptr": x, "row_ptr": row, "residual_ptr": residual} | sizes | written
    first |= {"statistics_ptr": statistics}
    second = {"x_ptr": x} | parameters | {"statistics_ptr": statistics} | sizes | {"out_ptr": out}
    if residual is not None:  # the sum holds the row already
        second |= {"x_ptr": total, "row_ptr": None}
    finish |= {"SLABS": triton.next_power_of_2(slabs)}
    statistics_launch = Launch(_statistics_kernel, first, tile, grid, config.num_warps)
    apply_launch = Launch(_apply_kernel, second, finish, grid, config.num_warps)
    return (statistics_launch, apply_launch), (out, total)


run = Launcher(plan)
