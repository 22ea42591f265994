"""Triton implementation of `group_norm_silu`: one pass over memory if whole groups fit on chip.

Otherwise one kernel that reads them twice, if there are programs enough, or two kernels: the
statistics of each channel in each slab of rows, then their combination and the normalisation. A
second reading begins with the last rows, which are still in L2.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.contract import Launch, Launcher, float_bits, power_parts
from fastdiff.kernels.dispatch import expects
from fastdiff.kernels.group_norm_silu.launches import GROUPS, candidates, pick
from fastdiff.kernels.group_norm_silu.spec import Arguments
from fastdiff.kernels.group_norm_silu.tiles import (
    KEPT,
    RESIDUAL,
    ROW,
    SHIFT,
    SILU,
    added_of,
    keep,
    lines_of,
    load_tiles,
    merge,
    missing_of,
    moments_of,
    opened,
    recall,
    store_tile,
    sum_tile,
    sums_of,
)

__all__ = ["candidates", "pick", "plan", "run"]

# arguments that need no new compilation; ALIGN states which number divides them
ANY = ["L", "C", "C2", "W", "beside_batch", "row_stride", "scale_stride", "flags", "eps"]
ANY += ["slab_rows"]


@triton.jit(do_not_specialize=ANY)
def _one_pass_kernel(
    x_ptr, weight_ptr, bias_ptr, row_ptr, residual_ptr, beside_ptr, shift_ptr, scale_ptr,
    L, C, C2, beside_batch, row_stride, scale_stride, flags, W, eps, sum_ptr, out_ptr,
    ALIGN: tl.constexpr, SEGMENT: tl.constexpr, BORDER: tl.constexpr, GROUPS: tl.constexpr,
    GELU: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each program normalises the groups in one sample's segment, kept in registers."""
    sample = tl.program_id(2).to(tl.int64)
    source, vectors, parts, C = opened(
        x_ptr, row_ptr, residual_ptr, beside_ptr, shift_ptr, sum_ptr, sample, 0, L, C, C2,
        beside_batch, row_stride, flags, ALIGN, SEGMENT, BORDER, P0, P1,
    )  # fmt: skip
    rows = tl.arange(0, ROWS)
    tile0, tile1 = load_tiles(source, None, parts, rows, L, flags, P1)
    tile0, tile1 = tile0.to(tl.float32), tile1.to(tl.float32)
    missing0, missing1 = added_of(vectors, parts, P1)
    if flags & KEPT != 0:
        tile0 = sum_tile(tile0, source, missing0, parts[0], rows, L, flags)
        missing0 = tl.zeros_like(missing0)
        if P1 > 0:
            tile1 = sum_tile(tile1, source, missing1, parts[1], rows, L, flags)
            missing1 = tl.zeros_like(missing1)
    count = (rows < L).to(tl.float32)[:, None]
    length = 1.0 * L
    moments0 = moments_of(tile0, None, count, length)
    moments1 = moments0
    if P1 > 0:
        moments1 = moments_of(tile1, None, count, length)
    if scale_ptr is not None:
        scale_ptr += sample * scale_stride
    affine = weight_ptr, bias_ptr, scale_ptr, C
    line0, line1 = lines_of(
        affine, parts, (missing0, missing1), moments0, moments1, length, W, eps, SEGMENT, GROUPS, P1
    )
    out_ptr += sample * L * C
    store_tile(out_ptr, tile0, line0, parts[0], rows, L, C, flags, GELU)
    if P1 > 0:
        store_tile(out_ptr, tile1, line1, parts[1], rows, L, C, flags, GELU)


@triton.jit
def _slab_moments(
    source, added, parts, end, flags, P0: tl.constexpr, P1: tl.constexpr, ROWS: tl.constexpr
):
    """Means and centred squares [ROWS, P] of both tiles over the slab's rows before `end`, and of
    how many pixels each, [ROWS, 1]; with `added`, of the sums, which are written."""
    rows = tl.arange(0, ROWS)
    next0, next1 = load_tiles(source, added, parts, rows, end, flags, P1)
    mean0 = tl.zeros((ROWS, P0), tl.float32)
    mean1 = tl.zeros((ROWS, P1 if P1 > 0 else P0), tl.float32)
    square0, square1 = mean0, mean1
    for start in range(0, end, ROWS):
        tile0, tile1 = next0, next1
        count = 1.0 * (start // ROWS)
        share = tl.where(start + rows < end, 1.0 / (count + 1.0), 0.0)[:, None]
        # load the next pixels while these are processed
        next0, next1 = load_tiles(source, added, parts, start + ROWS + rows, end, flags, P1)
        mean0, square0 = merge(mean0, square0, count, tile0.to(tl.float32), None, share)
        if P1 > 0:
            mean1, square1 = merge(mean1, square1, count, tile1.to(tl.float32), None, share)
    count = tl.maximum((end - rows + ROWS - 1) // ROWS, 0).to(tl.float32)[:, None]
    return (mean0, square0), (mean1, square1), count


@triton.jit
def _store_slab(
    out_ptr, source, tiles, lines, parts, rows, end, C, flags,
    GELU: tl.constexpr, P1: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Normalise a slab from its last `rows`, whose tiles are loaded, to its first."""
    next0, next1 = tiles
    for _ in range(0, end, ROWS):
        tile0, tile1, here = next0, next1, rows
        rows -= ROWS
        next0, next1 = load_tiles(source, None, parts, rows, end, flags, P1)
        store_tile(out_ptr, tile0, lines[0], parts[0], here, end, C, flags, GELU)
        if P1 > 0:
            store_tile(out_ptr, tile1, lines[1], parts[1], here, end, C, flags, GELU)


@triton.jit(do_not_specialize=ANY)
def _statistics_kernel(
    x_ptr, row_ptr, residual_ptr, beside_ptr, shift_ptr,
    L, C, C2, beside_batch, row_stride, flags, slab_rows, sum_ptr, statistics_ptr,
    ALIGN: tl.constexpr, SEGMENT: tl.constexpr, BORDER: tl.constexpr, SUMMED: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean and centred squares of a slab's channels: statistics [B, slabs, 2, C + C2]."""
    start = tl.program_id(0) * slab_rows
    end = tl.minimum(slab_rows, L - start)
    sample = tl.program_id(2).to(tl.int64)
    source, vectors, parts, C = opened(
        x_ptr, row_ptr, residual_ptr, beside_ptr, shift_ptr, sum_ptr, sample, start, L, C, C2,
        beside_batch, row_stride, flags, ALIGN, SEGMENT, BORDER, P0, P1,
    )  # fmt: skip
    added = None
    if SUMMED:
        added = added_of(vectors, parts, P1)
    tiles0, tiles1, count = _slab_moments(source, added, parts, end, flags, P0, P1, ROWS)
    statistics_ptr += (sample * tl.num_programs(0) + tl.program_id(0)) * 2 * C
    length = end.to(tl.float32)
    missing0, missing1 = missing_of(vectors, parts, SUMMED, P1)
    keep(statistics_ptr, tiles0[0], tiles0[1], count, missing0, length, parts[0], C)
    if P1 > 0:
        keep(statistics_ptr, tiles1[0], tiles1[1], count, missing1, length, parts[1], C)


@triton.jit(do_not_specialize=ANY)
def _apply_kernel(
    x_ptr, weight_ptr, bias_ptr, row_ptr, residual_ptr, beside_ptr, shift_ptr, scale_ptr,
    statistics_ptr, L, C, C2, beside_batch, row_stride, scale_stride, flags, W, eps, slab_rows,
    sum_ptr, out_ptr,
    ALIGN: tl.constexpr, SEGMENT: tl.constexpr, BORDER: tl.constexpr, GROUPS: tl.constexpr,
    GELU: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Normalise a slab's rows, the last first, by the statistics of all slabs."""
    slabs = tl.num_programs(0)
    start = (slabs - 1 - tl.program_id(0)) * slab_rows
    end = tl.minimum(slab_rows, L - start)
    sample = tl.program_id(2).to(tl.int64)
    source, vectors, parts, C = opened(
        x_ptr, row_ptr, residual_ptr, beside_ptr, shift_ptr, sum_ptr, sample, start, L, C, C2,
        beside_batch, row_stride, flags, ALIGN, SEGMENT, BORDER, P0, P1,
    )  # fmt: skip
    rows = (end - 1) // ROWS * ROWS + tl.arange(0, ROWS)
    # issued before the statistics are read
    next0, next1 = load_tiles(source, None, parts, rows, end, flags, P1)
    statistics_ptr += sample * slabs * 2 * C
    missing = added_of(vectors, parts, P1)
    moments0 = recall(statistics_ptr, slabs, slab_rows, L, C, missing[0], parts[0], P0)
    moments1 = moments0
    if P1 > 0:
        moments1 = recall(statistics_ptr, slabs, slab_rows, L, C, missing[1], parts[1], P1)
    if scale_ptr is not None:
        scale_ptr += sample * scale_stride
    affine = weight_ptr, bias_ptr, scale_ptr, C
    line0, line1 = lines_of(
        affine, parts, missing, moments0, moments1, 1.0 * L, W, eps, SEGMENT, GROUPS, P1
    )
    out_ptr += (sample * L + start) * C
    _store_slab(
        out_ptr, source, (next0, next1), (line0, line1), parts, rows, end, C, flags, GELU, P1, ROWS
    )


@triton.jit(do_not_specialize=ANY)
def _twice_kernel(
    x_ptr, weight_ptr, bias_ptr, row_ptr, residual_ptr, beside_ptr, shift_ptr, scale_ptr,
    L, C, C2, beside_batch, row_stride, scale_stride, flags, W, eps, sum_ptr, out_ptr,
    ALIGN: tl.constexpr, SEGMENT: tl.constexpr, BORDER: tl.constexpr, SUMMED: tl.constexpr,
    GROUPS: tl.constexpr, GELU: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Each program normalises the groups in one sample's segment: it reads them for their
    statistics, writing the sum if SUMMED, and reads the sum or them again."""
    sample = tl.program_id(2).to(tl.int64)
    source, vectors, parts, C = opened(
        x_ptr, row_ptr, residual_ptr, beside_ptr, shift_ptr, sum_ptr, sample, 0, L, C, C2,
        beside_batch, row_stride, flags, ALIGN, SEGMENT, BORDER, P0, P1,
    )  # fmt: skip
    added = None
    if SUMMED:
        added = added_of(vectors, parts, P1)
    tiles0, tiles1, count = _slab_moments(source, added, parts, L, flags, P0, P1, ROWS)
    length = 1.0 * L
    moments0 = moments_of(tiles0[0], tiles0[1], count, length)
    moments1 = moments0
    if P1 > 0:
        moments1 = moments_of(tiles1[0], tiles1[1], count, length)
    again = source
    if SUMMED:
        again = sums_of(source)
        tl.debug_barrier()  # the program's other threads have written them
    rows = (L - 1) // ROWS * ROWS + tl.arange(0, ROWS)
    tiles = load_tiles(again, None, parts, rows, L, flags, P1)
    if scale_ptr is not None:
        scale_ptr += sample * scale_stride
    affine = weight_ptr, bias_ptr, scale_ptr, C
    missing = missing_of(vectors, parts, SUMMED, P1)
    lines = lines_of(
        affine, parts, missing, moments0, moments1, length, W, eps, SEGMENT, GROUPS, P1
    )
    out_ptr += sample * L * C
    _store_slab(out_ptr, again, tiles, lines, parts, rows, L, C, flags, GELU, P1, ROWS)


def plan(arch: int, a: Arguments) -> tuple[tuple[Launch, ...], tuple[Tensor, Tensor]]:
    """The launches for x [B, Y, X, C], and their outputs: the result and the sum (or empty)."""
    B, Y, X, C = a.x.shape
    C2, beside_batch = (0, 1) if a.beside is None else (a.beside.shape[3], a.beside.shape[0])
    L, W, size = Y * X, (C + C2) // a.groups, a.x.element_size()
    for name in ("x", "residual", "beside", "shift", "row", "scale_shift"):
        tensor = getattr(a, name)
        if tensor is not None:  # of rows, each must be contiguous
            expects(f"group_norm_silu: {name}", tensor, a.x, tensor.shape)
    plain = a.act != "gelu" and a.scale_shift is None
    border = C if C2 > 0 else 0
    config = pick(B, L, W, a.groups, size, arch, plain, border)
    segment = config.groups * W
    row_stride, scale_stride = (0 if t is None else t.stride(0) for t in (a.row, a.scale_shift))
    align = math.gcd(16 // size, segment, C, C2, row_stride)
    compiled: dict[str, Any] = {"ALIGN": align, "SEGMENT": segment, "ROWS": config.rows}
    compiled["P0"], compiled["P1"] = power_parts(segment, 16 // size)
    compiled |= {"BORDER": border % segment != 0, "SUMMED": a.summed, "GELU": a.act == "gelu"}
    compiled["GROUPS"] = max(GROUPS[not config.slabs], triton.next_power_of_2(config.groups))
    out = a.x.new_empty((B, Y, X, C + C2))
    total = a.x.new_empty(out.shape if a.summed else 0)
    terms = {ROW: a.row, SHIFT: a.shift, RESIDUAL: a.residual}
    flags = sum(flag.value for flag, term in terms.items() if term is not None)
    flags += SILU.value * (a.act == "silu") + KEPT.value * a.summed
    given = {"row": a.row, "residual": a.residual, "beside": a.beside, "shift": a.shift}
    values: dict[str, Any] = {
        f"{name}_ptr": a.x if tensor is None else tensor for name, tensor in given.items()
    }
    values |= {"x_ptr": a.x, "weight_ptr": a.weight, "bias_ptr": a.bias, "out_ptr": out}
    values |= {"sum_ptr": total if a.summed else a.x, "L": L, "C": C, "C2": C2, "W": W}
    values |= {"beside_batch": beside_batch, "row_stride": row_stride, "flags": flags}
    values["eps"] = float_bits(a.eps)
    slab_rows = triton.cdiv(L, max(1, config.slabs))
    values |= {"scale_ptr": a.scale_shift, "scale_stride": scale_stride, "slab_rows": slab_rows}
    grid = (triton.cdiv(L, slab_rows), a.groups // config.groups, B)  # no slab is empty

    def launch(kernel: Any) -> Launch:
        own = [{n: d[n] for n in kernel.arg_names if n in d} for d in (values, compiled)]
        return Launch(kernel, own[0], own[1], grid, config.num_warps, vector=align * size)

    if not config.slabs:
        return (launch(_one_pass_kernel),), (out, total)
    if grid[0] == 1:
        return (launch(_twice_kernel),), (out, total)
    values["statistics_ptr"] = a.x.new_empty((B, grid[0], 2, C + C2), dtype=torch.float32)
    first = launch(_statistics_kernel)
    if a.summed:  # the sum has all terms and all channels
        values |= dict.fromkeys([*(f"{name}_ptr" for name in given), "x_ptr"], total)
        values |= {"flags": flags & SILU.value, "C": C + C2, "C2": 0, "beside_batch": 1}
        compiled["BORDER"] = False
    return (first, launch(_apply_kernel)), (out, total)


run = Launcher(Arguments, plan)
