"""Triton implementation of `line_silu`: one read and one write of each pixel."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.contract import INTERPRETED_TILE, Launch, Launcher
from fastdiff.kernels.line_silu.spec import Arguments
from fastdiff.kernels.moments.gpu import LINE, LaunchConfig
from fastdiff.kernels.tuned import tunable


@triton.jit(do_not_specialize=["L", "C"])
def _line_silu_kernel(
    x_ptr, line_ptr, L, C, out_ptr,
    ALIGN: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Each program does ROWS pixels and P channels. C is a multiple of ALIGN; dividing and
    multiplying by it lets the compiler know."""
    C = C // ALIGN * ALIGN
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * P + tl.arange(0, P)
    exists = channels < C
    inside = (rows < L)[:, None] & exists[None, :]
    places = rows.to(tl.int64)[:, None] * C + channels[None, :]
    tile = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    centre = tl.load(line_ptr + channels, mask=exists, other=0.0)
    slope = tl.load(line_ptr + C + channels, mask=exists, other=0.0)
    offset = tl.load(line_ptr + 2 * C + channels, mask=exists, other=0.0)
    y = (tile - centre[None, :]) * slope[None, :] + offset[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out_ptr + places, y, mask=inside)


@tunable("line_silu")
def pick(C: int, arch: int) -> LaunchConfig:
    """The launch for pixels of C channels."""
    if not arch:
        channels = triton.next_power_of_2(C)
        return LaunchConfig(max(1, INTERPRETED_TILE // channels), channels, 4)
    return candidates(C, arch)[0]


def candidates(C: int, arch: int) -> tuple[LaunchConfig, ...]:
    """Launches for a tuner to try, the default first: 16 elements per thread, which are two 16-byte
    loads in half precision."""
    channels = min(LINE, triton.next_power_of_2(C))
    return tuple(
        LaunchConfig(max(1, tile // channels), channels, warps)
        for tile in (2048, 4096, 1024)
        for warps in (4, 8)
    )


def plan(arch: int, a: Arguments) -> tuple[tuple[Launch, ...], Tensor]:
    """The launch for x [..., C], and the output it writes."""
    if not a.x.is_contiguous() or not a.line.is_contiguous():
        raise ValueError("line_silu: x and line must be contiguous")
    C, size = a.x.shape[-1], a.x.element_size()
    L = a.x.numel() // C
    config = pick(C, arch)
    out = torch.empty_like(a.x)
    align = math.gcd(16 // size, C)
    arguments: dict[str, Any] = {"x_ptr": a.x, "line_ptr": a.line, "L": L, "C": C, "out_ptr": out}
    constants = {"ALIGN": align, "SILU": a.silu, "ROWS": config.rows, "P": config.channels}
    grid = (triton.cdiv(L, config.rows), triton.cdiv(C, config.channels))
    launch = Launch(
        _line_silu_kernel, arguments, constants, grid, config.num_warps, vector=align * size
    )
    return (launch,), out


run = Launcher(Arguments, plan)
