"""Triton implementation of `softmax`: a row that fits on chip is read once, others twice."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.contract import INTERPRETED_TILE, Launch, Launcher, float_bits
from fastdiff.kernels.softmax.spec import Arguments
from fastdiff.kernels.tuned import tunable

LEAST = tl.constexpr(-3.4028235e38)


@triton.jit(do_not_specialize=["L", "K", "scale"])
def _softmax_kernel(
    scores_ptr, L, K, scale, out_ptr,
    ALIGN: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each program does ROWS of the L rows, TILE keys at a time; WHOLE: all of them at once. scale:
    the bits of a float32. K is a multiple of ALIGN; dividing and multiplying by it lets the
    compiler know."""
    K = K // ALIGN * ALIGN
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)[:, None]
    keys = tl.arange(0, TILE)[None, :]
    exists = rows < L - first
    scores_ptr += first * K + rows * K
    out_ptr += first * K + rows * K
    scale = scale.to(tl.float32, bitcast=True)
    if WHOLE:
        inside = exists & (keys < K)
        tile = tl.load(scores_ptr + keys, mask=inside, other=0.0) * scale
        tile = tl.where(keys < K, tile, float("-inf"))
        tile = tl.exp(tile - tl.max(tile, 1)[:, None])
        tl.store(out_ptr + keys, tile / tl.sum(tile, 1)[:, None], mask=inside)
    else:
        most = tl.full((ROWS, TILE), LEAST, tl.float32)
        total = tl.zeros((ROWS, TILE), tl.float32)
        for start in range(0, K, TILE):
            within = start + keys < K
            tile = tl.load(scores_ptr + start + keys, mask=exists & within, other=0.0) * scale
            tile = tl.where(within, tile, float("-inf"))
            higher = tl.maximum(most, tile, propagate_nan=tl.PropagateNan.ALL)
            total = total * tl.exp(most - higher) + tl.exp(tile - higher)
            most = higher
        top = tl.max(most, 1)[:, None]
        summed = tl.sum(total * tl.exp(most - top), 1)[:, None]
        for start in range(0, K, TILE):
            inside = exists & (start + keys < K)
            tile = tl.load(scores_ptr + start + keys, mask=inside, other=0.0) * scale
            tl.store(out_ptr + start + keys, tl.exp(tile - top) / summed, mask=inside)


@dataclass(frozen=True)
class LaunchConfig:
    """Rows per program, keys per tile, warps."""

    rows: int
    tile: int
    num_warps: int


MOST = 16384
"""Scores of a program: 32 for each thread of 16 warps."""
EACH = 8
"""Scores per thread in a short row: two 16-byte loads."""


@tunable("softmax")
def pick(L: int, K: int, arch: int) -> LaunchConfig:
    """The launch for L rows of K scores."""
    tile = min(triton.next_power_of_2(K), MOST)
    warps = max(1, min(16, tile // (32 * EACH)))
    rows = max(1, 128 // tile) if arch else max(1, INTERPRETED_TILE // tile)
    return LaunchConfig(rows, tile, warps)


def candidates(L: int, K: int, arch: int) -> tuple[LaunchConfig, ...]:
    """Launches for a tuner to try, the default first."""
    own = pick(L, K, arch)
    found = [LaunchConfig(own.rows, own.tile, warps) for warps in (4, 8, 16)]
    return tuple(dict.fromkeys([own, *found]))


def plan(arch: int, a: Arguments) -> tuple[tuple[Launch, ...], Tensor]:
    """The launch for scores [..., K], and the output it writes."""
    if not a.scores.is_contiguous() or a.scores.dtype != torch.float32:
        raise ValueError(
            f"softmax: scores are {a.scores.dtype} with strides {a.scores.stride()}; expected"
            " contiguous float32"
        )
    K = a.scores.shape[-1]
    L = a.scores.numel() // max(1, K)
    config = pick(L, K, arch)
    out = torch.empty_like(a.scores, dtype=a.like.dtype)
    align = math.gcd(16 // out.element_size(), K)
    arguments: dict[str, Any] = {"scores_ptr": a.scores, "L": L, "K": K}
    arguments |= {"scale": float_bits(a.scale), "out_ptr": out}
    constants: dict[str, Any] = {"ALIGN": align, "WHOLE": config.tile >= K}
    constants |= {"ROWS": config.rows, "TILE": config.tile}
    grid = (triton.cdiv(L, config.rows),)
    vector = min(16, align * out.element_size())
    return (
        Launch(_softmax_kernel, arguments, constants, grid, config.num_warps, vector=vector),
    ), out


run = Launcher(Arguments, plan)
