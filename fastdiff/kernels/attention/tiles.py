"""Device functions on tiles that the `attention` and `joint_attention` kernels share.

A head's width is one or two powers of two, each with its own dots and accumulators (40 = 32 + 8,
the second one as a masked 16). So nothing is padded in memory, and 80 is not computed as 128.
Scores (times log2(e), for exp2), softmax and accumulators are fp32; fp32 inputs are multiplied in
full fp32, not TF32. K and V tiles are [KEYS, part], everything else is [QUERIES, ...].
"""

import math

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def load(ptr, rows, stride, end, FIRST: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    """Columns from FIRST on of the rows before `end`, zero elsewhere: [ROWS, P]."""
    column = FIRST + tl.arange(0, P)
    inside = (rows < end)[:, None] & (column < K)[None, :]
    return tl.load(ptr + rows[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def parts(ptr, rows, stride, end, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Both parts of the rows, [ROWS, P0] and [ROWS, P1]; if there is no second, the first twice."""
    part0 = load(ptr, rows, stride, end, 0, P0, K)
    part1 = part0
    if P1 > 0:
        part1 = load(ptr, rows, stride, end, P0, P1, K)
    return part0, part1


@triton.jit
def store(ptr, tile, rows, stride, end, FIRST: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    column = FIRST + tl.arange(0, P)
    inside = (rows < end)[:, None] & (column < K)[None, :]
    tl.store(ptr + rows[:, None] * stride + column[None, :], tile, mask=inside)


@triton.jit
def write(ptr, out, total, rows, stride, end, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Write out / total, both parts."""
    inverse = (1.0 / total)[:, None]
    store(ptr, out[0] * inverse, rows, stride, end, 0, P0, K)
    if P1 > 0:
        store(ptr, out[1] * inverse, rows, stride, end, P0, P1, K)


@triton.jit
def head_at(ptr, sample, head, stride_b, stride_h, stride_l, ALIGN: tl.constexpr):
    """A head's first element and its row stride. All strides are multiples of ALIGN; dividing and
    multiplying by it lets the compiler know. Otherwise heads 40 wide are loaded 2 bytes at a
    time."""
    return ptr + (sample * stride_b + head * stride_h) // ALIGN * ALIGN, stride_l // ALIGN * ALIGN


@triton.jit
def zeros(ROWS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    return tl.zeros((ROWS, P0), tl.float32), tl.zeros((ROWS, P1 if P1 > 0 else 16), tl.float32)


@triton.jit
def products(q, k, P1: tl.constexpr):
    """q k^T over both parts, not yet scaled: [QUERIES, KEYS]."""
    scores = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    if P1 > 0:
        scores = tl.dot(q[1], tl.trans(k[1]), scores, input_precision="ieee")
    return scores


@triton.jit
def weigh(weights, v, out, P1: tl.constexpr):
    """out + weights v, both parts."""
    weights = weights.to(v[0].dtype)
    out0, out1 = out
    out0 = tl.dot(weights, v[0], out0, input_precision="ieee")
    if P1 > 0:
        out1 = tl.dot(weights, v[1], out1, input_precision="ieee")
    return out0, out1


@triton.jit
def masked(
    scores, mask_ptr, queries, Lq, keys, Lk, mask_sq, mask_sk,
    MASK_ROWS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Scores with the additive mask, and -inf for keys beyond the end."""
    if mask_ptr is not None:
        pointers = mask_ptr + keys[None, :] * mask_sk
        inside = (keys < Lk)[None, :]
        if MASK_ROWS:
            pointers += queries[:, None] * mask_sq
            inside &= (queries < Lq)[:, None]
        mask = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        # the lowest fp32 or bf16 number times log2(e) must not become -inf: a row fully masked by
        # that number is the mean of its values, a row of -inf is NaN
        lowered = tl.maximum(mask * LOG2E, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        scores += tl.where(mask == float("-inf"), mask, lowered)
    if ENDS:
        scores = tl.where((keys < Lk)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _block(
    state, q, k_ptr, v_ptr, mask_ptr, queries, Lq, start, Lk, k_sl, v_sl, mask_sq, mask_sk,
    SCALE: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    KEYS: tl.constexpr, TAIL: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to the running (peak, total, accumulators)."""
    peak, total, out0, out1 = state
    keys = tl.arange(0, KEYS)
    left = Lk - start
    end = left if TAIL else KEYS
    start = tl.full((), 0, tl.int64) + start
    k = parts(k_ptr + start * k_sl, keys, k_sl, end, K, P0, P1)
    scores = products(q, k, P1)
    # a positive scale does not move the peak, so it is applied with the subtraction in one fused
    # multiply-add: one multiplication less per score
    LATER: tl.constexpr = SCALE > 0 and not TAIL and mask_ptr is None
    UNIT: tl.constexpr = SCALE if LATER else 1.0
    if not LATER:
        scores *= SCALE
    if mask_ptr is not None:
        mask_ptr += start * mask_sk
    scores = masked(scores, mask_ptr, queries, Lq, keys, left, mask_sq, mask_sk, MASK_ROWS, TAIL)
    higher = tl.maximum(peak, tl.max(scores, 1) * UNIT)
    base = higher
    if mask_ptr is not None:  # if all are masked so far: avoid -inf - -inf
        base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * UNIT - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    v = parts(v_ptr + start * v_sl, keys, v_sl, end, K, P0, P1)
    out0, out1 = weigh(weights, v, (out0 * shrink[:, None], out1 * shrink[:, None]), P1)
    return higher, total, out0, out1


@triton.jit
def begin(QUERIES: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """The state before any key: peak and total [QUERIES], and both accumulators."""
    out0, out1 = zeros(QUERIES, P0, P1)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    return peak, tl.zeros((QUERIES,), tl.float32), out0, out1


@triton.jit
def flash(
    state, q, k_ptr, v_ptr, mask_ptr, queries, Lq, Lk, k_sl, v_sl, mask_sq, mask_sk,
    SCALE: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    KEYS: tl.constexpr, TAIL: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Add all Lk keys to the state, KEYS at a time; TAIL: the last block is partial."""
    peak, total, out0, out1 = state
    whole = Lk // KEYS * KEYS
    for first in range(0, whole, KEYS):
        peak, total, out0, out1 = _block(
            (peak, total, out0, out1), q, k_ptr, v_ptr, mask_ptr, queries, Lq, first, Lk,
            k_sl, v_sl, mask_sq, mask_sk, SCALE, K, P0, P1, KEYS, False, MASK_ROWS,
        )  # fmt: skip
    if TAIL:
        peak, total, out0, out1 = _block(
            (peak, total, out0, out1), q, k_ptr, v_ptr, mask_ptr, queries, Lq, whole, Lk,
            k_sl, v_sl, mask_sq, mask_sk, SCALE, K, P0, P1, KEYS, True, MASK_ROWS,
        )  # fmt: skip
    return peak, total, out0, out1
