"""Triton implementation of `attention`.

Long keys: the flash algorithm. Few keys (a text prompt): all of K and V stay in shared memory, the
softmax is the plain one and the program walks over tiles of queries.
A head's width is one or two powers of two with their own dots and accumulators (40 = 32 + 8, of
which the second is a masked 16), so nothing is padded in memory and 80 does not compute as 128; the
keys of the second kernel are split alike (77 = 64 + 13 of 16). Scores (times log2(e), for exp2),
softmax and accumulators are fp32; fp32 inputs are multiplied in full fp32, not TF32.
"""

import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.contract import Launch, Launcher, power_parts

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load(ptr, rows, stride, end, FIRST: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    """Columns FIRST.. of the rows before `end`, zero elsewhere: [ROWS, P]."""
    column = FIRST + tl.arange(0, P)
    inside = (rows < end)[:, None] & (column < K)[None, :]
    return tl.load(ptr + rows[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _parts(ptr, rows, stride, end, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Both parts of the rows, [ROWS, P0] and [ROWS, P1]; without a second, the first twice."""
    part0 = _load(ptr, rows, stride, end, 0, P0, K)
    part1 = part0
    if P1 > 0:
        part1 = _load(ptr, rows, stride, end, P0, P1, K)
    return part0, part1


@triton.jit
def _store(ptr, tile, rows, stride, end, FIRST: tl.constexpr, P: tl.constexpr, K: tl.constexpr):
    column = FIRST + tl.arange(0, P)
    inside = (rows < end)[:, None] & (column < K)[None, :]
    tl.store(ptr + rows[:, None] * stride + column[None, :], tile, mask=inside)


@triton.jit
def _write(ptr, out, total, rows, stride, end, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Write out / total, both parts."""
    inverse = (1.0 / total)[:, None]
    _store(ptr, out[0] * inverse, rows, stride, end, 0, P0, K)
    if P1 > 0:
        _store(ptr, out[1] * inverse, rows, stride, end, P0, P1, K)


@triton.jit
def _head(ptr, sample, head, stride_b, stride_h, stride_l, ALIGN: tl.constexpr):
    """A head's first element and its row stride. All strides are multiples of ALIGN, which dividing
    and multiplying tells the compiler: else heads 40 wide are loaded 2 bytes at a time."""
    return ptr + (sample * stride_b + head * stride_h) // ALIGN * ALIGN, stride_l // ALIGN * ALIGN


@triton.jit
def _zeros(ROWS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    return tl.zeros((ROWS, P0), tl.float32), tl.zeros((ROWS, P1 if P1 > 0 else 16), tl.float32)


@triton.jit
def _scores(q, k, P1: tl.constexpr):
    """q k^T over both parts: [QUERIES, KEYS]."""
    scores = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    if P1 > 0:
        scores = tl.dot(q[1], tl.trans(k[1]), scores, input_precision="ieee")
    return scores


@triton.jit
def _weigh(weights, v, out, P1: tl.constexpr):
    """out + weights v, both parts."""
    weights = weights.to(v[0].dtype)
    out0, out1 = out
    out0 = tl.dot(weights, v[0], out0, input_precision="ieee")
    if P1 > 0:
        out1 = tl.dot(weights, v[1], out1, input_precision="ieee")
    return out0, out1


@triton.jit
def _bias(scores, mask_ptr, queries, Lq, keys, Lk, mask_sq, mask_sk, ROWS: tl.constexpr):
    """Scores with the additive mask, and -inf for keys that do not exist."""
    if mask_ptr is not None:
        pointers = mask_ptr + keys[None, :] * mask_sk
        inside = (keys < Lk)[None, :]
        if ROWS:
            pointers += queries[:, None] * mask_sq
            inside &= (queries < Lq)[:, None]
        scores += tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * LOG2E
    return tl.where((keys < Lk)[None, :], scores, float("-inf"))


@triton.jit
def _flash_block(
    state, q, k_ptr, v_ptr, mask_ptr, queries, Lq, start, Lk, k_sl, v_sl, mask_sq, mask_sk,
    SCALE: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    KEYS: tl.constexpr, TAIL: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running (peak, sum, accumulators)."""
    peak, total, out0, out1 = state
    keys = tl.arange(0, KEYS)
    left = Lk - start
    end = left if TAIL else KEYS
    start = tl.full((), 0, tl.int64) + start
    k = _parts(k_ptr + start * k_sl, keys, k_sl, end, K, P0, P1)
    scores = _scores(q, k, P1) * SCALE
    if TAIL or mask_ptr is not None:
        if mask_ptr is not None:
            mask_ptr += start * mask_sk
        scores = _bias(scores, mask_ptr, queries, Lq, keys, left, mask_sq, mask_sk, MASK_ROWS)
    higher = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # all masked so far: no -inf - -inf
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    v = _parts(v_ptr + start * v_sl, keys, v_sl, end, K, P0, P1)
    out0, out1 = _weigh(weights, v, (out0 * shrink[:, None], out1 * shrink[:, None]), P1)
    return higher, total, out0, out1


@triton.jit
def _flash_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr,
    Lq, Lk, H, q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, v_sb, v_sl, v_sh,
    mask_sb, mask_sh, mask_sq, mask_sk, out_ptr, ALIGN: tl.constexpr,
    SCALE: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """A program does QUERIES queries of one head."""
    start = tl.program_id(0).to(tl.int64) * QUERIES
    head = (tl.program_id(1) % H).to(tl.int64)
    sample = (tl.program_id(1) // H).to(tl.int64)
    q_ptr, q_sl = _head(q_ptr, sample, head, q_sb, q_sh, q_sl, ALIGN)
    k_ptr, k_sl = _head(k_ptr, sample, head, k_sb, k_sh, k_sl, ALIGN)
    v_ptr, v_sl = _head(v_ptr, sample, head, v_sb, v_sh, v_sl, ALIGN)
    if mask_ptr is not None:
        mask_ptr += sample * mask_sb + head * mask_sh + start * mask_sq
    queries = tl.arange(0, QUERIES)
    left = Lq - start
    q = _parts(q_ptr + start * q_sl, queries, q_sl, left, K, P0, P1)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out0, out1 = _zeros(QUERIES, P0, P1)
    whole = Lk // KEYS * KEYS
    for first in range(0, whole, KEYS):
        peak, total, out0, out1 = _flash_block(
            (peak, total, out0, out1), q, k_ptr, v_ptr, mask_ptr, queries, left, first, Lk,
            k_sl, v_sl, mask_sq, mask_sk, SCALE, K, P0, P1, KEYS, False, MASK_ROWS,
        )  # fmt: skip
    if TAIL:
        peak, total, out0, out1 = _flash_block(
            (peak, total, out0, out1), q, k_ptr, v_ptr, mask_ptr, queries, left, whole, Lk,
            k_sl, v_sl, mask_sq, mask_sk, SCALE, K, P0, P1, KEYS, True, MASK_ROWS,
        )  # fmt: skip
    out_ptr += ((sample * Lq + start) * H + head) * K
    _write(out_ptr, (out0, out1), total, queries, H * K, left, K, P0, P1)


@triton.jit
def _prompt_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr,
    Lq, Lk, H, q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, v_sb, v_sl, v_sh,
    mask_sb, mask_sh, mask_sq, mask_sk, tiles, out_ptr, ALIGN: tl.constexpr,
    SCALE: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    QUERIES: tl.constexpr, KEYS0: tl.constexpr, KEYS1: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """A program keeps the keys and values of one head and does `tiles` tiles of queries."""
    head = (tl.program_id(1) % H).to(tl.int64)
    sample = (tl.program_id(1) // H).to(tl.int64)
    q_ptr, q_sl = _head(q_ptr, sample, head, q_sb, q_sh, q_sl, ALIGN)
    k_ptr, k_sl = _head(k_ptr, sample, head, k_sb, k_sh, k_sl, ALIGN)
    v_ptr, v_sl = _head(v_ptr, sample, head, v_sb, v_sh, v_sl, ALIGN)
    keys0 = tl.arange(0, KEYS0)
    k0 = _parts(k_ptr, keys0, k_sl, Lk, K, P0, P1)
    v0 = _parts(v_ptr, keys0, v_sl, Lk, K, P0, P1)
    if KEYS1 > 0:
        keys1 = KEYS0 + tl.arange(0, KEYS1)
        k1 = _parts(k_ptr, keys1, k_sl, Lk, K, P0, P1)
        v1 = _parts(v_ptr, keys1, v_sl, Lk, K, P0, P1)
    queries = tl.arange(0, QUERIES)
    for tile in range(0, tiles):
        start = ((tl.program_id(0) * tiles + tile) * QUERIES).to(tl.int64)
        left = Lq - start
        q = _parts(q_ptr + start * q_sl, queries, q_sl, left, K, P0, P1)
        row = mask_ptr
        if mask_ptr is not None:
            row = mask_ptr + sample * mask_sb + head * mask_sh + start * mask_sq
        scores0 = _scores(q, k0, P1) * SCALE
        scores0 = _bias(scores0, row, queries, left, keys0, Lk, mask_sq, mask_sk, MASK_ROWS)
        peak = tl.max(scores0, 1)
        if KEYS1 > 0:
            scores1 = _scores(q, k1, P1) * SCALE
            scores1 = _bias(scores1, row, queries, left, keys1, Lk, mask_sq, mask_sk, MASK_ROWS)
            peak = tl.maximum(peak, tl.max(scores1, 1))
        peak = peak[:, None]
        weights = tl.exp2(scores0 - peak)
        total = tl.sum(weights, 1)
        out = _weigh(weights, v0, _zeros(QUERIES, P0, P1), P1)
        if KEYS1 > 0:
            weights1 = tl.exp2(scores1 - peak)
            total += tl.sum(weights1, 1)
            out = _weigh(weights1, v1, out, P1)
        tile_ptr = out_ptr + ((sample * Lq + start) * H + head) * K
        _write(tile_ptr, out, total, queries, H * K, left, K, P0, P1)


@dataclass(frozen=True)
class LaunchConfig:
    """Queries of a tile, keys of a block (0: all of them stay on chip), warps, pipeline stages."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


FLASH = (  # (kind of architecture, widest head), LaunchConfig
    ("wgmma", 64, 128, 64, 4, 3),  # sm_90, 100: 227 KiB of shared memory a block
    ("wgmma", 128, 128, 64, 8, 3),
    ("wgmma", 256, 128, 64, 8, 2),
    ("wgmma", 512, 64, 16, 8, 2),  # one head of a VAE, 64 x 512 accumulators; 32 keys spill
    ("large", 64, 128, 64, 8, 3),  # sm_80: 163 KiB; 4 warps spill at 40 wide
    ("large", 128, 128, 64, 8, 3),
    ("large", 256, 128, 32, 8, 2),
    ("large", 512, 64, 32, 8, 2),
    ("small", 64, 128, 64, 8, 3),  # sm_86, 89, 120: 99 KiB; 4 warps spill with a last masked block
    ("small", 96, 128, 32, 8, 3),
    ("small", 128, 64, 32, 8, 2),  # with 4 warps, or 128 queries, its masked block spills
    ("small", 256, 64, 16, 4, 2),
    ("small", 512, 32, 16, 4, 1),
    ("fp32", 64, 32, 16, 4, 1),  # dots are fused multiply-adds in registers
    ("fp32", 160, 16, 16, 4, 1),
    ("fp32", 512, 16, 16, 8, 1),
    ("interpreted", 512, 256, 128, 1, 1),  # it takes its time for an operation, not its size
)
KINDS = {0: "interpreted", 80: "large", 90: "wgmma", 100: "wgmma"}  # the others are small
# most keys that stay on chip, KiB of K and V: four prompts, or two where mma.sync takes registers
ON_CHIP = {"wgmma": (320, 96), "large": (160, 64), "small": (160, 48), "interpreted": (320, 96)}
PROMPT_SCORES = 16384  # of a tile, fp32
PROMPT_PROGRAMS = 528  # four for each SM of an H100


def pick(Lk: int, K: int, size: int, arch: int) -> LaunchConfig:
    """Launch for Lk keys of heads K wide, `size` bytes an element. ValueError beyond 512."""
    kind = KINDS.get(arch, "small")
    keys, (most_keys, most_kib) = sum(power_parts(Lk, 16)), ON_CHIP[kind]
    kib = 2 * keys * sum(power_parts(K, 16)) * size / 1024
    if size < 4 and keys <= most_keys and kib <= most_kib:
        return LaunchConfig(128 if keys * 128 <= PROMPT_SCORES else 64, 0, 8, 1)
    kind = "fp32" if size == 4 and arch else kind
    for row_kind, widest, *config in FLASH:
        if row_kind == kind and widest >= K:
            return LaunchConfig(*config)
    raise ValueError(f"attention: heads are {K} wide; the kernel takes at most 512")


def plan(
    arch: int, q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None = None, scale: float | None = None,
) -> tuple[tuple[Launch, ...], Tensor]:  # fmt: skip
    """The launch for q [B, Lq, H, K] and k, v [B, Lk, H, K], and the output it writes."""
    (B, Lq, H, K), Lk = q.shape, k.shape[1]
    if bad := [tensor.stride() for tensor in (q, k, v) if tensor.stride(3) != 1]:
        raise ValueError(f"attention: q, k or v has strides {bad[0]}; the last must be 1")
    strides = [s for tensor in (q, k, v) for s in tensor.stride()[:3]]
    align = math.gcd(16 // q.element_size(), *strides)
    strides += mask.expand(B, H, Lq, Lk).stride() if mask is not None else (0, 0, 0, 0)
    names = [f"{t}_s{axis}" for t in "qkv" for axis in "blh"]
    names += [f"mask_s{axis}" for axis in "bhqk"]
    arguments: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "mask_ptr": mask}
    arguments |= {"Lq": Lq, "Lk": Lk, "H": H} | dict(zip(names, strides, strict=True))
    config, (P0, P1) = pick(Lk, K, q.element_size(), arch), power_parts(K, 16)
    scale = (1.0 / math.sqrt(K) if scale is None else scale) * LOG2E.value
    constants: dict[str, Any] = {"SCALE": scale, "K": K, "P0": P0, "P1": P1, "ALIGN": align}
    constants |= {"QUERIES": config.queries, "MASK_ROWS": arguments["mask_sq"] != 0}
    tiles = triton.cdiv(Lq, config.queries)
    if config.keys:
        kernel = _flash_kernel
        constants |= {"KEYS": config.keys, "TAIL": Lk % config.keys != 0}
    else:
        kernel = _prompt_kernel
        arguments["tiles"] = max(1, tiles * B * H // PROMPT_PROGRAMS)
        tiles = triton.cdiv(tiles, arguments["tiles"])
        constants["KEYS0"], constants["KEYS1"] = power_parts(Lk, 16)
    out = arguments["out_ptr"] = q.new_empty((B, Lq, H, K))
    grid = (tiles, B * H)
    return (Launch(kernel, arguments, constants, grid, config.num_warps, config.num_stages),), out


run = Launcher(plan)
