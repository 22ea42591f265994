"""Triton implementation of `qk_norm`: each program does the same heads of q and of k.

A head is divided among `lanes` threads, one 16-byte vector each. So a rotary pair is in one thread:
splitting and joining the tile [ROWS, P / 2, 2] moves no data, and loads are as wide as without
rotation. q and k of a token share its cosines and sines.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.contract import INTERPRETED_TILE, Launch, Launcher, float_bits
from fastdiff.kernels.qk_norm.spec import Arguments, check
from fastdiff.kernels.tuned import tunable

STRIDES = ["q_sb", "q_sl", "q_sh", "k_sb", "k_sl", "k_sh"]


@triton.jit
def _turned(y):
    """(-y[2i + 1], y[2i]) in place of each pair: [ROWS, P]."""
    even, odd = tl.split(tl.reshape(y, (y.shape[0], y.shape[1] // 2, 2)))
    return tl.reshape(tl.join(-odd, even), y.shape)


@triton.jit
def _one(x, weight_ptr, cos, sin, column, exists, eps, K: tl.constexpr):
    """RMSNorm of the rows of x [ROWS, P], and its rotation unless cos is None."""
    x = x.to(tl.float32)
    y = x * (1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / K + eps))[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=exists, other=0.0).to(tl.float32)
    if cos is not None:
        y = y * cos + _turned(y) * sin
    return y


@triton.jit(do_not_specialize=["L", "H", *STRIDES, "eps"])
def _qk_norm_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    L, H, q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, eps, q_out_ptr, k_out_ptr,
    K: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Each program does ROWS of the L * H heads of one sample; eps: the bits of a float32."""
    eps = eps.to(tl.float32, bitcast=True)
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // H).to(tl.int64), row % H
    column = tl.broadcast_to(tl.arange(0, P)[None, :], (ROWS, P))
    exists = tl.broadcast_to((row < L * H)[:, None], (ROWS, P))
    if P > K:
        exists = exists & (column < K)
    # dividing and multiplying by ALIGN lets the compiler know that it divides the strides
    q_row = (sample * q_sb + token * q_sl + head * q_sh) // ALIGN * ALIGN
    k_row = (sample * k_sb + token * k_sl + head * k_sh) // ALIGN * ALIGN
    q = tl.load(q_ptr + q_row[:, None] + column, mask=exists, other=0.0)
    k = tl.load(k_ptr + k_row[:, None] + column, mask=exists, other=0.0)
    cos = None
    sin = None
    if cos_ptr is not None:
        angle = token[:, None] * K + column
        cos = tl.load(cos_ptr + angle, mask=exists, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=exists, other=0.0)
    out = ((sample * L * H + row) * K)[:, None] + column
    q = _one(q, q_weight_ptr, cos, sin, column, exists, eps, K)
    tl.store(q_out_ptr + out, q, mask=exists)
    k = _one(k, k_weight_ptr, cos, sin, column, exists, eps, K)
    tl.store(k_out_ptr + out, k, mask=exists)


@dataclass(frozen=True)
class LaunchConfig:
    """Heads per program (of q, and as many of k), warps."""

    rows: int
    num_warps: int


@tunable("qk_norm")
def pick(L: int, H: int, K: int, vector: int, arch: int) -> LaunchConfig:
    """The launch for samples of L tokens and H heads K wide; `vector` elements are one load."""
    if not arch:
        return LaunchConfig(triton.next_power_of_2(min(L * H, INTERPRETED_TILE // K)), 4)
    return candidates(L, H, K, vector, arch)[0]


def candidates(L: int, H: int, K: int, vector: int, arch: int) -> tuple[LaunchConfig, ...]:
    """Launches for a tuner to try, the default first: one load of q and one of k per thread of four
    warps; then more warps, fewer warps and several loads."""
    lanes = max(1, triton.next_power_of_2(K) // vector)
    found = [(n * 32 * w // lanes, w) for n in (1, 2, 4) for w in (4, 8, 2)]
    return tuple(LaunchConfig(max(1, rows), w) for rows, w in found)


def plan(arch: int, a: Arguments) -> tuple[tuple[Launch, ...], tuple[Tensor, Tensor]]:
    """The launch for q and k [B, L, H, K], and the two contiguous outputs it writes."""
    check(a)
    B, L, H, K = a.q.shape
    size = a.q.element_size()
    strides = dict(zip(STRIDES, (*a.q.stride()[:3], *a.k.stride()[:3]), strict=True))
    align = gcd(16 // size, *strides.values())
    vector = gcd(align, K)
    config = pick(L, H, K, vector, arch)
    outputs = (a.q.new_empty(a.q.shape), a.q.new_empty(a.q.shape))
    arguments: dict[str, Any] = {"q_ptr": a.q, "k_ptr": a.k}
    arguments |= {"q_weight_ptr": a.q_weight, "k_weight_ptr": a.k_weight}
    arguments |= {"cos_ptr": a.cos, "sin_ptr": a.sin, "L": L, "H": H} | strides
    arguments |= {"eps": float_bits(a.eps), "q_out_ptr": outputs[0], "k_out_ptr": outputs[1]}
    constants = {"K": K, "P": triton.next_power_of_2(K), "ROWS": config.rows}
    constants |= {"ALIGN": align}
    grid = (triton.cdiv(L * H, config.rows), B)
    launch = Launch(
        _qk_norm_kernel, arguments, constants, grid, config.num_warps, vector=vector * size
    )
    return (launch,), outputs


run = Launcher(Arguments, plan)
