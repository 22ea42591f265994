"""Triton implementation of `attention`.

Long keys: the flash algorithm. Few keys (a text prompt): all of K and V stay in shared memory, the
softmax is the plain one, and the program loops over tiles of queries; the keys are split as a
head's width is (77 = 64 + 13 of 16). Few keys of heads too wide for that: programs share a head's
columns, and each computes all scores.

It uses neither bulk copies (TMA) nor persistent programs. A descriptor would be one more argument
of every launch, and K and V already arrive in 16-byte loads three blocks ahead. A tile's work spans
L keys, so the cost of starting a program does not matter.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.attention.launches import PROMPT_PROGRAMS, candidates, pick
from fastdiff.kernels.attention.spec import Arguments
from fastdiff.kernels.attention.tiles import (
    LOG2E,
    begin,
    flash,
    head_at,
    load,
    masked,
    parts,
    products,
    store,
    weigh,
    write,
    zeros,
)
from fastdiff.kernels.contract import Launch, Launcher, power_parts

__all__ = ["alignment", "candidates", "pick", "plan", "run"]


@triton.jit
def _flash_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr,
    Lq, Lk, H, q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, v_sb, v_sl, v_sh,
    mask_sb, mask_sh, mask_sq, mask_sk, out_ptr, ALIGN: tl.constexpr,
    SCALE: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Each program does QUERIES queries of one head."""
    start = tl.program_id(0).to(tl.int64) * QUERIES
    head = (tl.program_id(1) % H).to(tl.int64)
    sample = (tl.program_id(1) // H).to(tl.int64)
    q_ptr, q_sl = head_at(q_ptr, sample, head, q_sb, q_sh, q_sl, ALIGN)
    k_ptr, k_sl = head_at(k_ptr, sample, head, k_sb, k_sh, k_sl, ALIGN)
    v_ptr, v_sl = head_at(v_ptr, sample, head, v_sb, v_sh, v_sl, ALIGN)
    if mask_ptr is not None:
        mask_ptr += sample * mask_sb + head * mask_sh + start * mask_sq
    queries = tl.arange(0, QUERIES)
    left = Lq - start
    q = parts(q_ptr + start * q_sl, queries, q_sl, left, K, P0, P1)
    peak, total, out0, out1 = flash(
        begin(QUERIES, P0, P1), q, k_ptr, v_ptr, mask_ptr, queries, left, Lk,
        k_sl, v_sl, mask_sq, mask_sk, SCALE, K, P0, P1, KEYS, TAIL, MASK_ROWS,
    )  # fmt: skip
    out_ptr += ((sample * Lq + start) * H + head) * K
    write(out_ptr, (out0, out1), total, queries, H * K, left, K, P0, P1)


@triton.jit
def _prompt_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr,
    Lq, Lk, H, q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, v_sb, v_sl, v_sh,
    mask_sb, mask_sh, mask_sq, mask_sk, tiles, out_ptr, ALIGN: tl.constexpr,
    SCALE: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    QUERIES: tl.constexpr, KEYS0: tl.constexpr, KEYS1: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Each program keeps the keys and values of one head and does `tiles` tiles of queries."""
    head = (tl.program_id(1) % H).to(tl.int64)
    sample = (tl.program_id(1) // H).to(tl.int64)
    q_ptr, q_sl = head_at(q_ptr, sample, head, q_sb, q_sh, q_sl, ALIGN)
    k_ptr, k_sl = head_at(k_ptr, sample, head, k_sb, k_sh, k_sl, ALIGN)
    v_ptr, v_sl = head_at(v_ptr, sample, head, v_sb, v_sh, v_sl, ALIGN)
    keys0 = tl.arange(0, KEYS0)
    k0 = parts(k_ptr, keys0, k_sl, Lk, K, P0, P1)
    v0 = parts(v_ptr, keys0, v_sl, Lk, K, P0, P1)
    if KEYS1 > 0:
        keys1 = KEYS0 + tl.arange(0, KEYS1)
        k1 = parts(k_ptr, keys1, k_sl, Lk, K, P0, P1)
        v1 = parts(v_ptr, keys1, v_sl, Lk, K, P0, P1)
    queries = tl.arange(0, QUERIES)
    for tile in range(0, tiles):
        start = ((tl.program_id(0) * tiles + tile) * QUERIES).to(tl.int64)
        left = Lq - start
        q = parts(q_ptr + start * q_sl, queries, q_sl, left, K, P0, P1)
        row = mask_ptr
        if mask_ptr is not None:
            row = mask_ptr + sample * mask_sb + head * mask_sh + start * mask_sq
        scores0 = products(q, k0, P1) * SCALE
        scores0 = masked(
            scores0, row, queries, left, keys0, Lk, mask_sq, mask_sk, MASK_ROWS, KEYS1 == 0
        )  # of two parts the first is full
        peak = tl.max(scores0, 1)
        if KEYS1 > 0:
            scores1 = products(q, k1, P1) * SCALE
            scores1 = masked(
                scores1, row, queries, left, keys1, Lk, mask_sq, mask_sk, MASK_ROWS, True
            )
            peak = tl.maximum(peak, tl.max(scores1, 1))
        peak = peak[:, None]
        weights = tl.exp2(scores0 - peak)
        total = tl.sum(weights, 1)
        out = weigh(weights, v0, zeros(QUERIES, P0, P1), P1)
        if KEYS1 > 0:
            weights1 = tl.exp2(scores1 - peak)
            total += tl.sum(weights1, 1)
            out = weigh(weights1, v1, out, P1)
        tile_ptr = out_ptr + ((sample * Lq + start) * H + head) * K
        write(tile_ptr, out, total, queries, H * K, left, K, P0, P1)


@triton.jit
def _wide_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr,
    Lq, Lk, H, q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, v_sb, v_sl, v_sh,
    mask_sb, mask_sh, mask_sq, mask_sk, out_ptr, ALIGN: tl.constexpr,
    SCALE: tl.constexpr, K: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    COLUMNS: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Each program does COLUMNS columns of QUERIES queries of one head, whose keys are at most KEYS
    and whose width is a multiple of COLUMNS."""
    start = tl.program_id(0).to(tl.int64) * QUERIES
    head = (tl.program_id(1) % H).to(tl.int64)
    sample = (tl.program_id(1) // H).to(tl.int64)
    q_ptr, q_sl = head_at(q_ptr, sample, head, q_sb, q_sh, q_sl, ALIGN)
    k_ptr, k_sl = head_at(k_ptr, sample, head, k_sb, k_sh, k_sl, ALIGN)
    v_ptr, v_sl = head_at(v_ptr, sample, head, v_sb, v_sh, v_sl, ALIGN)
    if mask_ptr is not None:
        mask_ptr += sample * mask_sb + head * mask_sh + start * mask_sq
    q_ptr += start * q_sl
    left = Lq - start
    queries, keys = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    scores = tl.zeros((QUERIES, KEYS), tl.float32)
    for first in range(0, K, COLUMNS):
        q = load(q_ptr + first, queries, q_sl, left, 0, COLUMNS, COLUMNS)
        k = load(k_ptr + first, keys, k_sl, Lk, 0, COLUMNS, COLUMNS)
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
    scores *= SCALE
    scores = masked(scores, mask_ptr, queries, left, keys, Lk, mask_sq, mask_sk, MASK_ROWS, True)
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    column = tl.program_id(2) * COLUMNS
    v = load(v_ptr + column, keys, v_sl, Lk, 0, COLUMNS, COLUMNS)
    out = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    out_ptr += ((sample * Lq + start) * H + head) * K + column
    out *= (1.0 / tl.sum(weights, 1))[:, None]
    store(out_ptr, out, queries, H * K, left, 0, COLUMNS, COLUMNS)


def alignment(K: int, *states: Tensor) -> tuple[int, int]:
    """The number of elements that divides all strides, and the bytes that a thread loads at once.

    These are one element if a tensor does not begin at a multiple of 16 bytes. ValueError unless
    all last strides are 1.
    """
    if bad := [tensor.stride() for tensor in states if tensor.stride(3) != 1]:
        raise ValueError(f"attention: q, k or v has strides {bad[0]}; the last one must be 1")
    size = states[0].element_size()
    align = math.gcd(16 // size, K, *(s for tensor in states for s in tensor.stride()[:3]))
    begins = all(tensor.storage_offset() * size % 16 == 0 for tensor in states)
    return align, size * align if begins else size


def plan(arch: int, a: Arguments) -> tuple[tuple[Launch, ...], Tensor]:
    """The launch for q [B, Lq, H, K] and k, v [B, Lk, H, K], and the output it writes."""
    (B, Lq, H, K), Lk = a.q.shape, a.k.shape[1]
    align, vector = alignment(K, a.q, a.k, a.v)
    strides = [s for tensor in (a.q, a.k, a.v) for s in tensor.stride()[:3]]
    strides += a.mask.expand(B, H, Lq, Lk).stride() if a.mask is not None else (0, 0, 0, 0)
    names = [f"{t}_s{axis}" for t in "qkv" for axis in "blh"]
    names += [f"mask_s{axis}" for axis in "bhqk"]
    arguments: dict[str, Any] = {"q_ptr": a.q, "k_ptr": a.k, "v_ptr": a.v, "mask_ptr": a.mask}
    arguments |= {"Lq": Lq, "Lk": Lk, "H": H} | dict(zip(names, strides, strict=True))
    config, (P0, P1) = pick(Lk, K, a.q.element_size(), arch), power_parts(K, 16)
    scale = (1.0 / math.sqrt(K) if a.scale is None else a.scale) * LOG2E.value
    constants: dict[str, Any] = {"SCALE": scale, "K": K, "P0": P0, "P1": P1, "ALIGN": align}
    constants |= {"QUERIES": config.queries, "MASK_ROWS": arguments["mask_sq"] != 0}
    tiles = triton.cdiv(Lq, config.queries)
    more: tuple[int, ...] = ()
    if config.columns:
        kernel, more = _wide_kernel, (K // config.columns,)
        del constants["P0"], constants["P1"]
        constants |= {"KEYS": max(16, triton.next_power_of_2(Lk)), "COLUMNS": config.columns}
    elif config.keys:
        kernel = _flash_kernel
        constants |= {"KEYS": config.keys, "TAIL": Lk % config.keys != 0}
    else:
        kernel = _prompt_kernel
        arguments["tiles"] = max(1, tiles * B * H // PROMPT_PROGRAMS)
        tiles = triton.cdiv(tiles, arguments["tiles"])
        constants["KEYS0"], constants["KEYS1"] = power_parts(Lk, 16)
    out = arguments["out_ptr"] = a.q.new_empty((B, Lq, H, K))
    how = (config.num_warps, config.num_stages, vector)
    return (Launch(kernel, arguments, constants, (tiles, B * H, *more), *how),), out


run = Launcher(Arguments, plan)
