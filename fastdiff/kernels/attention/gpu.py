"""Triton implementation of `attention`.

Long keys: the flash algorithm. Few keys (a text prompt): all of K and V stay in shared memory, the
softmax is the plain one and the program walks over tiles of queries.
A head's width is one or two powers of two with their own dots and accumulators (40 = 32 + 8, of
which the second is a masked 16), so nothing is padded in memory and 80 does not compute as 128; the
keys of the second kernel are split in the same way (77 = 64 + 13 of 16).
Scores (times log2(e), for exp2), softmax and accumulators are fp32; fp32 inputs are multiplied in
full fp32, not TF32.
"""

import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.contract import Launch, architecture, power_parts

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load(ptr, rows, stride, end, FIRST: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    """Columns FIRST.. of the rows before `end`, zero elsewhere: [ROWS, P]."""
    column = FIRST + tl.arange(0, P)
    inside = (rows < end)[:, None] & (column < K)[None, :]
    return tl.load(ptr + rows[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store(ptr, tile, rows, stride, end, FIRST: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    column = FIRST + tl.arange(0, P)
    inside = (rows < end)[:, None] & (column < K)[None, :]
    tl.store(ptr + rows[:, None] * stride + column[None, :], tile, mask=inside)


@triton.jit
def _head(ptr, sample, head, stride_b, stride_h, ALIGN: tl.constexpr):
    """A head's first element. The strides are multiples of ALIGN, which the division and the
    multiplication tell the compiler: without it 40 wide heads are loaded 2 bytes at a time."""
    return ptr + (sample * stride_b + head * stride_h) // ALIGN * ALIGN


@triton.jit
def _dot(a, b, accumulator):
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _bias(
    scores, mask_ptr, queries, Lq, keys, Lk, mask_sq, mask_sk,
    MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Scores with the additive mask, and -inf for keys that do not exist."""
    if mask_ptr is not None:
        pointers = mask_ptr + keys[None, :] * mask_sk
        inside = (keys < Lk)[None, :]
        if MASK_ROWS:
            pointers += queries[:, None] * mask_sq
            inside &= (queries < Lq)[:, None]
        scores += tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * LOG2E
    return tl.where((keys < Lk)[None, :], scores, float("-inf"))


@triton.jit
def _finite(peak, HAS_MASK: tl.constexpr):
    """Row maxima to subtract: 0 for rows masked so far, where -inf - -inf would be NaN."""
    if HAS_MASK:
        return tl.where(peak == float("-inf"), 0.0, peak)
    return peak


@triton.jit
def _flash_block(
    state, q0, q1, k_ptr, v_ptr, mask_ptr, queries, Lq, start, Lk, k_sl, v_sl, mask_sq, mask_sk,
    SCALE: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    KEYS: tl.constexpr, TAIL: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running (peak, sum, accumulators)."""
    peak, total, out0, out1 = state
    keys = tl.arange(0, KEYS)
    left = Lk - start
    start = tl.to_tensor(start).to(tl.int64)
    k_ptr += start * k_sl
    v_ptr += start * v_sl
    end = left if TAIL else KEYS
    scores = tl.zeros((q0.shape[0], KEYS), tl.float32)
    scores = _dot(q0, tl.trans(_load(k_ptr, keys, k_sl, end, 0, P0, K)), scores)
    if P1 > 0:
        scores = _dot(q1, tl.trans(_load(k_ptr, keys, k_sl, end, P0, P1, K)), scores)
    scores *= SCALE
    if TAIL or mask_ptr is not None:
        if mask_ptr is not None:
            mask_ptr += start * mask_sk
        scores = _bias(scores, mask_ptr, queries, Lq, keys, left, mask_sq, mask_sk, MASK_ROWS)
    higher = tl.maximum(peak, tl.max(scores, 1))
    base = _finite(higher, mask_ptr is not None)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(v_ptr.dtype.element_ty)
    out0 = _dot(weights, _load(v_ptr, keys, v_sl, end, 0, P0, K), out0 * shrink[:, None])
    if P1 > 0:
        out1 = _dot(weights, _load(v_ptr, keys, v_sl, end, P0, P1, K), out1 * shrink[:, None])
    return higher, total, out0, out1


@triton.jit
def _flash_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr,
    Lq, Lk, H, q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, v_sb, v_sl, v_sh,
    mask_sb, mask_sh, mask_sq, mask_sk,
    out_ptr,
    SCALE: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr, MASK_ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """A program does QUERIES queries of one head."""
    start = tl.program_id(0).to(tl.int64) * QUERIES
    head = (tl.program_id(1) % H).to(tl.int64)
    sample = (tl.program_id(1) // H).to(tl.int64)
    q_sl, k_sl, v_sl = q_sl // ALIGN * ALIGN, k_sl // ALIGN * ALIGN, v_sl // ALIGN * ALIGN
    q_ptr = _head(q_ptr, sample, head, q_sb, q_sh, ALIGN) + start * q_sl
    k_ptr = _head(k_ptr, sample, head, k_sb, k_sh, ALIGN)
    v_ptr = _head(v_ptr, sample, head, v_sb, v_sh, ALIGN)
    if mask_ptr is not None:
        mask_ptr += sample * mask_sb + head * mask_sh + start * mask_sq
    out_ptr += ((sample * Lq + start) * H + head) * K
    queries = tl.arange(0, QUERIES)
    left = Lq - start
    q0 = _load(q_ptr, queries, q_sl, left, 0, P0, K)
    q1 = q0
    out1 = tl.zeros((QUERIES, 16), tl.float32)
    if P1 > 0:
        q1 = _load(q_ptr, queries, q_sl, left, P0, P1, K)
        out1 = tl.zeros((QUERIES, P1), tl.float32)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out0 = tl.zeros((QUERIES, P0), tl.float32)
    whole = Lk // KEYS * KEYS
    for first in range(0, whole, KEYS):
        peak, total, out0, out1 = _flash_block(
            (peak, total, out0, out1), q0, q1, k_ptr, v_ptr, mask_ptr, queries, left, first, Lk,
            k_sl, v_sl, mask_sq, mask_sk,
            SCALE, K, P0, P1, KEYS, False, MASK_ROWS,
        )  # fmt: skip
    if TAIL:
        peak, total, out0, out1 = _flash_block(
            (peak, total, out0, out1), q0, q1, k_ptr, v_ptr, mask_ptr, queries, left, whole, Lk,
            k_sl, v_sl, mask_sq, mask_sk,
            SCALE, K, P0, P1, KEYS, True, MASK_ROWS,
        )  # fmt: skip
    inverse = (1.0 / total)[:, None]
    _store(out_ptr, out0 * inverse, queries, H * K, left, 0, P0, K)
    if P1 > 0:
        _store(out_ptr, out1 * inverse, queries, H * K, left, P0, P1, K)


@triton.jit
def _prompt_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr,
    Lq, Lk, H, q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, v_sb, v_sl, v_sh,
    mask_sb, mask_sh, mask_sq, mask_sk, tiles,
    out_ptr,
    SCALE: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    QUERIES: tl.constexpr, KEYS0: tl.constexpr, KEYS1: tl.constexpr, MASK_ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """A program keeps the keys and values of one head and does `tiles` tiles of queries."""
    head = (tl.program_id(1) % H).to(tl.int64)
    sample = (tl.program_id(1) // H).to(tl.int64)
    q_sl, k_sl, v_sl = q_sl // ALIGN * ALIGN, k_sl // ALIGN * ALIGN, v_sl // ALIGN * ALIGN
    q_ptr = _head(q_ptr, sample, head, q_sb, q_sh, ALIGN)
    k_ptr = _head(k_ptr, sample, head, k_sb, k_sh, ALIGN)
    v_ptr = _head(v_ptr, sample, head, v_sb, v_sh, ALIGN)
    if mask_ptr is not None:
        mask_ptr += sample * mask_sb + head * mask_sh
    out_ptr += (sample * Lq * H + head) * K
    keys0 = tl.arange(0, KEYS0)
    k00 = tl.trans(_load(k_ptr, keys0, k_sl, Lk, 0, P0, K))
    v00 = _load(v_ptr, keys0, v_sl, Lk, 0, P0, K)
    if P1 > 0:
        k01 = tl.trans(_load(k_ptr, keys0, k_sl, Lk, P0, P1, K))
        v01 = _load(v_ptr, keys0, v_sl, Lk, P0, P1, K)
    if KEYS1 > 0:
        keys1 = KEYS0 + tl.arange(0, KEYS1)
        k10 = tl.trans(_load(k_ptr, keys1, k_sl, Lk, 0, P0, K))
        v10 = _load(v_ptr, keys1, v_sl, Lk, 0, P0, K)
        if P1 > 0:
            k11 = tl.trans(_load(k_ptr, keys1, k_sl, Lk, P0, P1, K))
            v11 = _load(v_ptr, keys1, v_sl, Lk, P0, P1, K)
    first = tl.program_id(0) * tiles * QUERIES
    for tile in range(0, tiles):
        start = (first + tile * QUERIES).to(tl.int64)
        queries = tl.arange(0, QUERIES)
        left = Lq - start
        q0 = _load(q_ptr + start * q_sl, queries, q_sl, left, 0, P0, K)
        zeros = tl.zeros((QUERIES, KEYS0), tl.float32)
        scores0 = _dot(q0, k00, zeros)
        if P1 > 0:
            q1 = _load(q_ptr + start * q_sl, queries, q_sl, left, P0, P1, K)
            scores0 = _dot(q1, k01, scores0)
        tile_mask = mask_ptr
        if mask_ptr is not None:
            tile_mask = mask_ptr + start * mask_sq
        scores0 = _bias(
            scores0 * SCALE, tile_mask, queries, left, keys0, Lk, mask_sq, mask_sk,
            MASK_ROWS,
        )  # fmt: skip
        peak = tl.max(scores0, 1)
        if KEYS1 > 0:
            scores1 = _dot(q0, k10, tl.zeros((QUERIES, KEYS1), tl.float32))
            if P1 > 0:
                scores1 = _dot(q1, k11, scores1)
            scores1 = _bias(
                scores1 * SCALE, tile_mask, queries, left, keys1, Lk, mask_sq, mask_sk,
                MASK_ROWS,
            )  # fmt: skip
            peak = tl.maximum(peak, tl.max(scores1, 1))
        peak = _finite(peak, mask_ptr is not None)[:, None]
        weights0 = tl.exp2(scores0 - peak)
        total = tl.sum(weights0, 1)
        weights0 = weights0.to(v00.dtype)
        out0 = _dot(weights0, v00, tl.zeros((QUERIES, P0), tl.float32))
        if P1 > 0:
            out1 = _dot(weights0, v01, tl.zeros((QUERIES, P1), tl.float32))
        if KEYS1 > 0:
            weights1 = tl.exp2(scores1 - peak)
            total += tl.sum(weights1, 1)
            weights1 = weights1.to(v00.dtype)
            out0 = _dot(weights1, v10, out0)
            if P1 > 0:
                out1 = _dot(weights1, v11, out1)
        inverse = (1.0 / total)[:, None]
        out = out_ptr + start * H * K
        _store(out, out0 * inverse, queries, H * K, left, 0, P0, K)
        if P1 > 0:
            _store(out, out1 * inverse, queries, H * K, left, P0, P1, K)


@dataclass(frozen=True)
class LaunchConfig:
    """Queries of a tile, keys of a block (0: all of them stay on chip), warps, pipeline stages."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


FLASH = {  # (widest head, queries, keys, warps, stages), by kind of architecture
    "wgmma": (  # sm_90, 100: 227 KiB of shared memory a block
        (64, 128, 64, 4, 3),
        (128, 128, 64, 8, 3),
        (256, 128, 64, 8, 2),
        (512, 64, 16, 8, 2),  # one head of a VAE: 64 x 512 accumulators, 32 keys spill 56 bytes
    ),
    "large": (  # sm_80: 163 KiB
        (64, 128, 64, 8, 3),  # 4 warps spill 32 bytes at 40 wide
        (128, 128, 64, 8, 3),
        (256, 128, 64, 8, 2),
        (512, 64, 32, 8, 2),
    ),
    "small": (  # sm_86, 89, 120: 99 KiB
        (64, 128, 64, 8, 3),  # 4 warps spill 24 bytes where the last keys are masked
        (128, 128, 32, 8, 3),
        (256, 64, 32, 4, 2),
        (512, 32, 16, 4, 1),
    ),
    "fp32": (  # dots are fused multiply-adds in registers: small tiles
        (64, 32, 32, 4, 1),
        (160, 16, 32, 4, 1),
        (512, 16, 16, 8, 1),
    ),
}
KINDS = {80: "large", 86: "small", 89: "small", 90: "wgmma", 100: "wgmma", 120: "small"}
PROMPT_KEYS = {  # most that stay on chip: four prompts of 77, or two where mma.sync keeps them in
    "wgmma": 320,  # registers
    "large": 160,
    "small": 160,
}
PROMPT_BYTES = {"wgmma": 96 * 1024, "large": 96 * 1024, "small": 64 * 1024}  # of K and V
PROMPT_SCORES = 16384  # of a tile, fp32
PROMPT_PROGRAMS = 528  # four for each SM of an H100


def pick(Lk: int, K: int, size: int, arch: int) -> LaunchConfig:
    """Launch for Lk keys of heads K wide, `size` bytes an element. ValueError beyond 512."""
    kind = KINDS.get(arch, "wgmma")
    width = sum(power_parts(K, 16))
    keys = sum(power_parts(Lk, 16))
    on_chip = 2 * keys * width * size
    if size < 4 and keys <= PROMPT_KEYS[kind] and on_chip <= PROMPT_BYTES[kind]:
        return LaunchConfig(128 if keys * 128 <= PROMPT_SCORES else 64, 0, 8, 1)
    for widest, *config in FLASH["fp32" if size == 4 and arch else kind]:
        if widest >= K:
            return LaunchConfig(*config)
    raise ValueError(f"attention: heads are {K} wide; the kernel takes at most 512")


def plan(
    arch: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[tuple[Launch, ...], Tensor]:
    """The launch for q [B, Lq, H, K] and k, v [B, Lk, H, K], and the output it writes."""
    B, Lq, H, K = q.shape
    Lk = k.shape[1]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(3) != 1:
            raise ValueError(f"attention: {name} has strides {tensor.stride()}; the last must be 1")
    out = q.new_empty((B, Lq, H, K))
    strides = [s for tensor in (q, k, v) for s in tensor.stride()[:3]]
    vector = 16 // q.element_size()
    align = vector if all(s % vector == 0 for s in strides) else 1
    strides += mask.expand(B, H, Lq, Lk).stride() if mask is not None else (0, 0, 0, 0)
    names = [f"{tensor}_s{axis}" for tensor in "qkv" for axis in "blh"]
    names += [f"mask_s{axis}" for axis in "bhqk"]
    arguments: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "mask_ptr": mask}
    arguments |= {"Lq": Lq, "Lk": Lk, "H": H} | dict(zip(names, strides, strict=True))
    config = pick(Lk, K, q.element_size(), arch)
    P0, P1 = power_parts(K, 16)
    constants: dict[str, Any] = {
        "SCALE": (1.0 / math.sqrt(K) if scale is None else scale) * LOG2E.value,
        "K": K,
        "P0": P0,
        "P1": P1,
        "QUERIES": config.queries,
        "ALIGN": align,
        "MASK_ROWS": mask is not None and arguments["mask_sq"] != 0,
    }
    tiles = triton.cdiv(Lq, config.queries)
    if config.keys:
        kernel = _flash_kernel
        constants |= {"KEYS": config.keys, "TAIL": Lk % config.keys != 0}
    else:
        kernel = _prompt_kernel
        each = max(1, tiles * B * H // PROMPT_PROGRAMS)
        arguments["tiles"] = each
        tiles = triton.cdiv(tiles, each)
        constants["KEYS0"], constants["KEYS1"] = power_parts(Lk, 16)
    arguments["out_ptr"] = out
    grid = (tiles, B * H)
    return (Launch(kernel, arguments, constants, grid, config.num_warps, config.num_stages),), out


def run(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The op on CUDA tensors; on CPU tensors under Triton's interpreter."""
    launches, out = plan(architecture(q), q, k, v, mask, scale)
    for launch in launches:
        launch.start()
    return out
