"""Triton implementation of `ada_norm`: each row is read once, kept in registers and written once.

A row is divided among `lanes` threads in chunks of one 16-byte vector per thread. The program's
rows of one chunk form a tile [ROWS, CHUNK], and the tiles form a tuple. So 1536 halves are three
chunks of 64 threads, and no size has to be a power of two. As each thread holds part of one row, a
sum is an addition of tiles and one reduction: up to 32 lanes, a few shuffles without shared memory.
Parameters are loaded by each row, in x's layout, and come from L1. In another layout they
would pass through shared memory, and most loads would be narrower.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.ada_norm.spec import Arguments, check
from fastdiff.kernels.contract import INTERPRETED_TILE, Launch, Launcher, float_bits
from fastdiff.kernels.tuned import tunable


@triton.jit
def _load(ptr, offsets, inside, C: tl.constexpr):
    """Chunk C of the rows in fp32, zero outside. The chunk's offset is added last, so that a
    thread's addresses are one register plus constants."""
    start: tl.constexpr = C * offsets.shape[1]
    return tl.load(ptr + offsets + start, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, tile, offsets, inside, C: tl.constexpr):
    start: tl.constexpr = C * offsets.shape[1]
    tl.store(ptr + offsets + start, tile, mask=inside)


@triton.jit
def _inside(rows, C: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Mask of the elements of chunk C; only the last chunk may extend beyond D."""
    inside = tl.arange(0, ROWS)[:, None] < rows
    if (C + 1) * CHUNK > D:
        inside = inside & (tl.arange(0, CHUNK)[None, :] < D - C * CHUNK)
    return tl.broadcast_to(inside, (ROWS, CHUNK))


@triton.jit
def _with(tiles, tile):
    return tiles + (tile,)


@triton.jit
def _limited(tile, LIMIT: tl.constexpr):
    """The tile with numbers beyond ±LIMIT as ±LIMIT, unless that is 0; NaN stays NaN."""
    if LIMIT > 0:
        tile = tl.where(tile > LIMIT, LIMIT, tile)
        tile = tl.where(tile < -LIMIT, -LIMIT, tile)
    return tile


@triton.jit
def _mean(tiles, N: tl.constexpr, D: tl.constexpr):
    """The mean of each row: [ROWS, 1]."""
    total = tiles[0]
    for c in tl.static_range(1, N):
        total += tiles[c]
    return tl.sum(total, 1)[:, None] / D


@triton.jit
def _mean_square(tiles, N: tl.constexpr, D: tl.constexpr):
    total = tiles[0] * tiles[0]
    for c in tl.static_range(1, N):
        total += tiles[c] * tiles[c]
    return tl.sum(total, 1)[:, None] / D


# arguments that need no new compilation; ALIGN states which number divides the strides
ANY = ["L", "scale_stride", "shift_stride", "gate_stride", "residuals", "added", "eps"]


@triton.jit(do_not_specialize=ANY)
def _ada_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, gate_ptr, residual_ptr,
    later_ptr, L, scale_stride, shift_stride, gate_stride, residuals, added, eps, total_ptr,
    out_ptr,
    ALIGN: tl.constexpr, RMS: tl.constexpr, LIMIT: tl.constexpr, D: tl.constexpr,
    N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Each program does ROWS rows of one sample, in N chunks. A residual is added to a sample's
    first `added` rows: all or none. eps: the bits of a float32."""
    start = tl.program_id(0) * ROWS
    sample = tl.program_id(1).to(tl.int64)
    base = (sample * L + start) * D
    first = ((tl.program_id(1) % residuals).to(tl.int64) * L + start) * D
    scale_stride, shift_stride = scale_stride // ALIGN * ALIGN, shift_stride // ALIGN * ALIGN
    gate_stride = gate_stride // ALIGN * ALIGN
    lane = tl.broadcast_to(tl.arange(0, CHUNK)[None, :], (ROWS, CHUNK))
    offsets = tl.arange(0, ROWS)[:, None] * D + lane

    tiles = ()
    others = ()  # all loads are issued before the first sum is stored
    for c in tl.static_range(N):
        inside = _inside(L - start, c, D, ROWS, CHUNK)
        tile = _load(x_ptr + base, offsets, inside, c)
        if gate_ptr is not None:
            tile *= _load(gate_ptr + sample * gate_stride, lane, inside, c)
        tiles = _with(tiles, tile)
        inside = _inside(added - start, c, D, ROWS, CHUNK)
        others = _with(others, _load(residual_ptr + first, offsets, inside, c))
    sums = ()
    for c in tl.static_range(N):
        sums = _with(sums, _limited(tiles[c] + others[c], LIMIT))
    for c in tl.static_range(N):
        inside = _inside(added - start, c, D, ROWS, CHUNK)
        if later_ptr is None:
            _store(total_ptr + base, sums[c], offsets, inside, c)
        else:
            later = _load(later_ptr, lane, inside, c)
            _store(total_ptr + base, sums[c] + later, offsets, inside, c)
    tiles = sums

    if not RMS:
        # the sum may have rounded the mean; the second pass corrects it
        for _ in tl.static_range(2):
            mean = _mean(tiles, N, D)
            centred = ()
            for c in tl.static_range(N):
                tile = tiles[c] - mean
                if (c + 1) * CHUNK > D:
                    tile = tl.where(_inside(L - start, c, D, ROWS, CHUNK), tile, 0.0)
                centred = _with(centred, tile)
            tiles = centred
    rstd = 1.0 / tl.sqrt_rn(_mean_square(tiles, N, D) + eps.to(tl.float32, bitcast=True))

    for c in tl.static_range(N):
        inside = _inside(L - start, c, D, ROWS, CHUNK)
        y = tiles[c] * rstd
        if weight_ptr is not None:
            y *= _load(weight_ptr, lane, inside, c)
        if bias_ptr is not None:
            y += _load(bias_ptr, lane, inside, c)
        if scale_ptr is not None:
            y *= 1.0 + _load(scale_ptr + sample * scale_stride, lane, inside, c)
        if shift_ptr is not None:
            y += _load(shift_ptr + sample * shift_stride, lane, inside, c)
        _store(out_ptr + base, y, offsets, inside, c)


@dataclass(frozen=True)
class LaunchConfig:
    """Threads per row, rows per program, warps."""

    lanes: int
    rows: int
    num_warps: int


ELEMENTS = 32
"""The most elements of a row per thread, as fp32 registers. With all parameters a kernel then needs
up to 56 registers: 36 of an H100's 64 warps are resident, with three or more 16-byte loads in
flight per thread. 40 elements would fit rows of 320, 640 and 1280 without idle lanes, but need 64
to 95 registers; `candidates` has it."""
LOADS = 8  # per thread and row: if widths only allow loads of 2 bytes, a row gets more lanes
LEAST_LANES = 4  # 64 adjacent bytes of a row: two sectors


@tunable("ada_norm")
def pick(L: int, D: int, vector: int, arch: int) -> LaunchConfig:
    """The launch for samples of L rows of D elements; `vector` elements are one load."""
    least = max(LEAST_LANES, triton.cdiv(D, ELEMENTS), triton.cdiv(D, LOADS * vector))
    useful = triton.next_power_of_2(triton.cdiv(D, vector))
    lanes = min(triton.next_power_of_2(least), useful, 1024)
    num_warps = max(4, lanes // 32)
    rows = 32 * num_warps // lanes
    if not arch:
        rows = triton.next_power_of_2(min(L, max(1, INTERPRETED_TILE // D)))
    return LaunchConfig(lanes, rows, num_warps)


def candidates(L: int, D: int, vector: int, arch: int) -> tuple[LaunchConfig, ...]:
    """Launches for a tuner to try, `pick`'s first: more and fewer lanes, more and fewer warps."""
    own = pick(L, D, vector, arch)
    useful = triton.next_power_of_2(triton.cdiv(D, vector))
    lanes = [n for n in (own.lanes, 2 * own.lanes, own.lanes // 2) if 1 <= n <= useful]
    found = [LaunchConfig(n, 32 * w // n, w) for w in (4, 2, 8) for n in lanes if n <= 32 * w]
    return tuple(dict.fromkeys((own, *found)))


def plan(arch: int, a: Arguments) -> tuple[tuple[Launch, ...], tuple[Tensor, Tensor]]:
    """The launch for x [B, L, D] and its outputs: the result and the sum (or empty)."""
    check(a)
    if not a.x.is_contiguous():
        raise ValueError(f"ada_norm: x has strides {a.x.stride()}; make it contiguous")
    B, L, D = a.x.shape
    size = a.x.element_size()
    vector = gcd(16, D * size)
    config = pick(L, D, vector // size, arch)
    chunk = config.lanes * vector // size
    out = torch.empty_like(a.x)
    total = a.x.new_empty(0) if a.residual is None else torch.empty_like(a.x)
    modulation = {"scale": a.scale, "shift": a.shift, "gate": a.gate}
    strides = {n: 0 if rows is None else rows.stride(0) for n, rows in modulation.items()}
    arguments: dict[str, Any] = {"x_ptr": a.x, "weight_ptr": a.weight, "bias_ptr": a.bias}
    arguments |= {f"{name}_ptr": rows for name, rows in modulation.items()}
    arguments |= {"residual_ptr": a.x if a.residual is None else a.residual}
    arguments |= {"later_ptr": a.later, "L": L}
    arguments |= {f"{name}_stride": stride for name, stride in strides.items()}
    arguments |= {"residuals": B if a.residual is None else a.residual.shape[0]}
    arguments |= {"added": 0 if a.residual is None else L, "eps": float_bits(a.eps)}
    arguments |= {"total_ptr": a.x if a.residual is None else total, "out_ptr": out}
    constants: dict[str, Any] = {
        "ALIGN": gcd(vector // size, *strides.values()),
        "RMS": a.rms,
        "D": D,
    }
    constants |= {"LIMIT": 0.0 if a.residual is None else a.limit}
    constants |= {"N": triton.cdiv(D, chunk), "ROWS": config.rows, "CHUNK": chunk}
    grid = (triton.cdiv(L, config.rows), B)
    launch = Launch(_ada_norm_kernel, arguments, constants, grid, config.num_warps, vector=vector)
    return (launch,), (out, total)


run = Launcher(Arguments, plan)
