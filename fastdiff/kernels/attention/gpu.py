"""Triton implementation of `attention`.

Long keys: the flash algorithm. Few keys (a text prompt): all of K and V stay in shared memory, the
softmax is the plain one, and the program loops over tiles of queries; the keys are split as a
head's width is (77 = 64 + 13 of 16).

It uses neither bulk copies (TMA) nor persistent programs. A descriptor would be one more argument
of every launch, and K and V already arrive in 16-byte loads three blocks ahead. A tile's work spans
L keys, so the cost of starting a program does not matter.
"""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.attention.spec import Arguments
from fastdiff.kernels.attention.tiles import (
    LOG2E,
    begin,
    flash,
    head_at,
    masked,
    parts,
    products,
    weigh,
    write,
    zeros,
)
from fastdiff.kernels.contract import Launch, Launcher, power_parts
from fastdiff.kernels.tuned import tunable


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


@dataclass(frozen=True)
class LaunchConfig:
    """Queries per tile, keys per block (0: all stay on chip), warps, pipeline stages."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# (kind of architecture, widest head, LaunchConfig); comments: blocks per SM, by registers
FLASH = (
    # sm_90, 100. Two blocks: one multiplies while the other exponentiates. 128 queries, so 64 bytes
    # from L2 serve 8192 FLOPs. At width 64, 4 warps take 8.2 instructions per score, 8 take 9.7
    ("largest", 64, 128, 64, 4, 3),
    # width 80: two blocks, one with a partial block of keys; 4 warps spill
    ("largest", 128, 128, 64, 8, 3),
    ("largest", 256, 128, 64, 8, 2),  # one block
    ("largest", 512, 64, 16, 8, 2),  # a VAE's single head, 64 x 512 accumulators; 32 keys spill
    # sm_80, 86, 89 and 120 (a block has 99 KiB of shared memory): two or three blocks
    ("large", 80, 64, 64, 4, 3),
    ("large", 128, 128, 64, 8, 3),  # one block, as in the next row
    ("large", 256, 128, 32, 8, 2),
    ("large", 512, 64, 32, 8, 2),
    ("small", 64, 64, 64, 4, 3),  # with 2 stages the block with masked keys spills
    ("small", 80, 64, 64, 4, 2),  # with 3 stages only one block fits shared memory
    ("small", 96, 128, 32, 8, 3),
    ("small", 128, 64, 32, 8, 2),  # with 4 warps, or 128 queries, the block with masked keys spills
    ("small", 256, 64, 16, 4, 2),
    ("small", 512, 32, 16, 4, 1),
    ("fp32", 64, 32, 16, 4, 1),  # dots are fused multiply-adds in registers
    ("fp32", 160, 16, 16, 4, 1),
    ("fp32", 512, 16, 16, 8, 1),
    ("interpreted", 512, 256, 128, 1, 1),  # its time is per operation, whatever the size
)
"""Chosen by their compiled code; nothing is measured yet."""
KINDS = {0: "interpreted", 80: "large", 90: "largest", 100: "largest"}  # all others are small
SHARED = {"largest": 227, "large": 163, "small": 99}  # KiB per block
# fp32 values of scores and result per thread; nearly all configurations above this spill
ACCUMULATORS = 128
# the most keys to keep on chip, and KiB of K and V: four prompts, or two if mma.sync needs
# registers
ON_CHIP = {"largest": (320, 96), "large": (128, 64), "small": (160, 48), "interpreted": (320, 96)}
PROMPT_KEYS = 128  # up to here 4 warps do 64 queries at a time; beyond, 8 warps
PROMPT_PROGRAMS = 528  # four per SM of an H100


def stream(K: int, size: int, arch: int) -> LaunchConfig:
    """The row of `FLASH` for heads K wide, `size` bytes per element. ValueError beyond 512."""
    kind = "fp32" if size == 4 and arch else KINDS.get(arch, "small")
    for row_kind, widest, *config in FLASH:
        if row_kind == kind and widest >= K:
            return LaunchConfig(*config)
    raise ValueError(f"attention: heads are {K} wide; the kernel takes at most 512")


def streams(K: int, size: int, arch: int) -> tuple[LaunchConfig, ...]:
    """Launches for a tuner to try, `stream`'s first: those that fit a block."""
    own, kind, width = stream(K, size, arch), KINDS.get(arch, "small"), sum(power_parts(K, 16))
    if size == 4 or not arch:
        return (own,)
    return (own,) + tuple(
        config
        for queries, keys, warps, stages in product((128, 64), (128, 64, 32), (4, 8), (2, 3))
        if (config := LaunchConfig(queries, keys, warps, stages)) != own
        and queries * (width + keys) <= ACCUMULATORS * 32 * warps
        and queries >= 16 * warps
        and size * width * (queries + 2 * keys * stages) <= SHARED[kind] * 1024
    )


@tunable("attention")
def pick(Lk: int, K: int, size: int, arch: int) -> LaunchConfig:
    """The launch for Lk keys of heads K wide, `size` bytes per element. ValueError beyond 512."""
    kind = KINDS.get(arch, "small")
    keys, (most_keys, most_kib) = sum(power_parts(Lk, 16)), ON_CHIP[kind]
    kib = 2 * keys * sum(power_parts(K, 16)) * size / 1024
    if size < 4 and keys <= most_keys and kib <= most_kib:
        # heads 160 wide spill 16 bytes in 4 warps on sm_120
        if keys > PROMPT_KEYS or (kind == "small" and K > 128):
            return LaunchConfig(64, 0, 8, 1)
        # on sm_100 4 warps spill 24 bytes with a mask
        return LaunchConfig(128, 0, 8, 1) if arch == 100 else LaunchConfig(64, 0, 4, 1)
    return stream(K, size, arch)


def candidates(Lk: int, K: int, size: int, arch: int) -> tuple[LaunchConfig, ...]:
    """Launches for a tuner to try, `pick`'s first."""
    own = pick(Lk, K, size, arch)
    if own.keys:
        return streams(K, size, arch)
    others = (LaunchConfig(128, 0, 8, 1), LaunchConfig(64, 0, 4, 1), stream(K, size, arch))
    return tuple(dict.fromkeys((own, *others))) if arch else (own,)


def alignment(K: int, *states: Tensor) -> tuple[int, int]:
    """The number of elements that divides all strides, and the bytes that a thread loads at once.

    These are one element if a tensor does not begin at a multiple of 16 bytes. ValueError unless
    all last strides are 1.
    """
    if bad := [tensor.stride() for tensor in states if tensor.stride(3) != 1]:
        raise ValueError(f"attention: q, k or v has strides {bad[0]}; the last must be 1")
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
    if config.keys:
        kernel = _flash_kernel
        constants |= {"KEYS": config.keys, "TAIL": Lk % config.keys != 0}
    else:
        kernel = _prompt_kernel
        arguments["tiles"] = max(1, tiles * B * H // PROMPT_PROGRAMS)
        tiles = triton.cdiv(tiles, arguments["tiles"])
        constants["KEYS0"], constants["KEYS1"] = power_parts(Lk, 16)
    out = arguments["out_ptr"] = a.q.new_empty((B, Lq, H, K))
    how = (config.num_warps, config.num_stages, vector)
    return (Launch(kernel, arguments, constants, (tiles, B * H), *how),), out


run = Launcher(Arguments, plan)
