"""Triton implementation of `moments`: one read of each pixel."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.contract import Launch, Launcher
from fastdiff.kernels.group_norm_silu.tiles import merge, moments_of
from fastdiff.kernels.moments.spec import Arguments
from fastdiff.kernels.tuned import tunable


@triton.jit(do_not_specialize=["L", "C", "slab"])
def _moments_kernel(
    x_ptr, L, C, slab, out_ptr, ALIGN: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr
):
    """Each program does P channels of a slab, ROWS pixels at a time. C is a multiple of ALIGN;
    dividing and multiplying by it lets the compiler know."""
    C = C // ALIGN * ALIGN
    start = tl.program_id(0) * slab
    end = tl.minimum(slab, L - start)
    channels = tl.program_id(1) * P + tl.arange(0, P)
    exists = channels < C
    x_ptr += start.to(tl.int64) * C
    rows = tl.arange(0, ROWS)
    inside = (rows < end)[:, None] & exists[None, :]
    next_tile = tl.load(x_ptr + (rows[:, None] * C + channels[None, :]), mask=inside, other=0.0)
    mean = tl.zeros((ROWS, P), tl.float32)
    square = mean
    for first in range(0, end, ROWS):
        tile = next_tile
        count = 1.0 * (first // ROWS)
        share = tl.where(first + rows < end, 1.0 / (count + 1.0), 0.0)[:, None]
        # load the next pixels while these are processed
        later = first + ROWS + rows
        inside = (later < end)[:, None] & exists[None, :]
        places = later[:, None] * C + channels[None, :]
        next_tile = tl.load(x_ptr + places, mask=inside, other=0.0)
        mean, square = merge(mean, square, count, tile.to(tl.float32), None, share)
    count = tl.maximum((end - rows + ROWS - 1) // ROWS, 0).to(tl.float32)[:, None]
    pivot, drift, square = moments_of(mean, square, count, end.to(tl.float32))
    out_ptr += tl.program_id(0) * 3 * C + channels
    tl.store(out_ptr, pivot, mask=exists)
    tl.store(out_ptr + C, drift, mask=exists)
    tl.store(out_ptr + 2 * C, square, mask=exists)


@dataclass(frozen=True)
class LaunchConfig:
    """Pixels per iteration, channels per program, warps; `line_silu` uses it, too."""

    rows: int
    channels: int
    num_warps: int


LINE = 64
"""Channels: a line of L1 in half precision."""
INTERPRETED_ROWS = 32
"""As on a GPU: the interpreter adds a tile's rows in sequence, not as a tree."""


@tunable("moments")
def pick(C: int, slab: int, arch: int) -> LaunchConfig:
    """The launch for slabs of pixels of C channels."""
    if not arch:
        return LaunchConfig(INTERPRETED_ROWS, triton.next_power_of_2(C), 4)
    return candidates(C, slab, arch)[0]


def candidates(C: int, slab: int, arch: int) -> tuple[LaunchConfig, ...]:
    """Launches for a tuner to try, the default first: two 16-byte loads in flight per thread, in
    half precision."""
    channels = min(LINE, triton.next_power_of_2(C))
    most = triton.next_power_of_2(slab)
    found = [(tile // channels, warps) for tile in (2048, 4096, 1024) for warps in (4, 8)]
    return tuple(LaunchConfig(max(1, min(rows, most)), channels, w) for rows, w in found)


def plan(arch: int, a: Arguments) -> tuple[tuple[Launch, ...], Tensor]:
    """The launch for x [..., C], and the output [slabs, 3, C] it writes."""
    if not a.x.is_contiguous():
        raise ValueError(f"moments: x has strides {a.x.stride()}; make it contiguous")
    C, size = a.x.shape[-1], a.x.element_size()
    L = a.x.numel() // C
    config = pick(C, a.slab, arch)
    out = a.x.new_empty((triton.cdiv(L, a.slab), 3, C), dtype=torch.float32)
    align = math.gcd(16 // size, C)
    arguments: dict[str, Any] = {"x_ptr": a.x, "L": L, "C": C, "slab": a.slab, "out_ptr": out}
    constants = {"ALIGN": align, "ROWS": config.rows, "P": config.channels}
    grid = (out.shape[0], triton.cdiv(C, config.channels))
    launch = Launch(
        _moments_kernel, arguments, constants, grid, config.num_warps, vector=align * size
    )
    return (launch,), out


run = Launcher(Arguments, plan)
