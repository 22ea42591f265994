"""Triton implementation of `residual`: reads each operand once, writes each output pixel once."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.contract import INTERPRETED_TILE, Launch, Launcher, float_bits
from fastdiff.kernels.dispatch import expects
from fastdiff.kernels.residual.spec import Arguments
from fastdiff.kernels.tuned import tunable


@triton.jit(do_not_specialize=["pixels", "X", "C", "others", "shifts", "L", "gate_stride", "scale"])
def _residual_kernel(
    x_ptr, other_ptr, shift_ptr, gate_ptr, pixels, X, C, others, shifts, L, gate_stride, scale,
    out_ptr,
    ALIGN: tl.constexpr, ENLARGE: tl.constexpr, SCALED: tl.constexpr, LIMIT: tl.constexpr,
    ROWS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Each program does ROWS pixels of all pictures together, and P channels; adjacent programs do
    the same pixels. `other` has the first `others` pixels, `shift` the first `shifts` channels: all
    or none. A sample has L pixels and one row of `gate`; scale: the bits of a float32. C and the
    gate's stride are multiples of ALIGN; dividing and multiplying by it lets the compiler know.
    Otherwise 40 channels are loaded 2 bytes at a time."""
    C, shifts = C // ALIGN * ALIGN, shifts // ALIGN * ALIGN
    gate_stride = gate_stride // ALIGN * ALIGN
    tiles = tl.cdiv(C, P)
    rows = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(0) % tiles * P + tl.arange(0, P)
    exists = (channels < C)[None, :]
    inside = (rows < pixels)[:, None] & exists
    offsets = rows.to(tl.int64)[:, None] * C + channels[None, :]
    total = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(shift_ptr + channels, mask=channels < shifts, other=0.0)[None, :]
    both = (rows < others)[:, None] & exists
    other = tl.load(other_ptr + offsets, mask=both, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        row = (rows // L).to(tl.int64)[:, None] * gate_stride + channels[None, :]
        other *= tl.load(gate_ptr + row, mask=both, other=0.0).to(tl.float32)
    total += other
    if SCALED:
        total *= scale.to(tl.float32, bitcast=True)
    if LIMIT > 0:  # NaN stays NaN
        total = tl.where(total > LIMIT, LIMIT, total)
        total = tl.where(total < -LIMIT, -LIMIT, total)
    # the pictures' rows are numbered through, so a pixel has one row and one column
    row, column = rows // X, rows % X
    for down in tl.static_range(ENLARGE):
        for right in tl.static_range(ENLARGE):
            place = (row * ENLARGE + down).to(tl.int64) * (X * ENLARGE) + column * ENLARGE + right
            tl.store(out_ptr + place[:, None] * C + channels[None, :], total, mask=inside)


@dataclass(frozen=True)
class LaunchConfig:
    """Pixels and channels per program, warps."""

    rows: int
    channels: int
    num_warps: int


TILE = 2048
"""Elements per program: 16 per thread, two 16-byte accesses in half precision."""
LINE = 64
"""Channels: a line of L1 in half precision. More at once are not faster, and would be compiled for
every width."""
LEAST_PROGRAMS = 264
"""Two for each SM of an H100; with fewer programs, tiles are halved."""


@tunable("residual")
def pick(pixels: int, C: int, arch: int) -> LaunchConfig:
    """The launch for pixels of C channels."""
    channels = LINE if C % LINE == 0 else min(256, triton.next_power_of_2(C))
    tile = TILE if pixels * C >= TILE * LEAST_PROGRAMS else TILE // 2
    tile = tile if arch else INTERPRETED_TILE
    return LaunchConfig(max(1, tile // channels), channels, 4)


def candidates(pixels: int, C: int, arch: int) -> tuple[LaunchConfig, ...]:
    """Launches for a tuner to try."""
    own = pick(pixels, C, arch)
    return tuple(
        LaunchConfig(max(1, tile // own.channels), own.channels, warps)
        for tile in (1024, 2048, 4096, 8192)
        for warps in (4, 8)
    )


def plan(arch: int, a: Arguments) -> tuple[tuple[Launch, ...], Tensor]:
    """The launch for x [..., C], or [B, Y, X, C] to enlarge, and the output it writes."""
    if not all(t is None or t.is_contiguous() for t in (a.x, a.other, a.shift)):
        raise ValueError("residual: x, other and shift must be contiguous")
    expects("residual: gate", a.gate, a.x, (a.x.shape[0], a.x.shape[-1]))
    *pixels_of, X, C = a.x.shape
    pixels = math.prod(pixels_of) * X
    if a.enlarge > 1:
        B, Y = pixels_of
        out = a.x.new_empty((B, Y * a.enlarge, X * a.enlarge, C))
    else:
        out = torch.empty_like(a.x)
    config = pick(pixels, C, arch)
    arguments: dict[str, Any] = {"x_ptr": a.x, "other_ptr": a.x if a.other is None else a.other}
    arguments |= {"shift_ptr": a.x if a.shift is None else a.shift, "gate_ptr": a.gate}
    arguments |= {"pixels": pixels, "X": X, "C": C}
    arguments |= {"others": 0 if a.other is None else pixels, "shifts": 0 if a.shift is None else C}
    stride = 0 if a.gate is None else a.gate.stride(0)
    arguments |= {"L": pixels // max(1, len(a.x)), "gate_stride": stride, "out_ptr": out}
    arguments |= {"scale": float_bits(a.scale)}
    vector = math.gcd(16, C * a.x.element_size())
    constants = {
        "ALIGN": math.gcd(vector // a.x.element_size(), stride),
        "ENLARGE": a.enlarge,
        "SCALED": a.scale != 1.0,
        "LIMIT": a.limit,
        "ROWS": config.rows,
        "P": config.channels,
    }
    grid = (triton.cdiv(pixels, config.rows) * triton.cdiv(C, config.channels),)
    return (
        Launch(_residual_kernel, arguments, constants, grid, config.num_warps, vector=vector),
    ), out


run = Launcher(Arguments, plan)
