"""Triton implementation of `joint_attention`: flash attention over two separate sequences.

The grid covers the tiles of the picture's queries, then those of the text's. Every program loops
over the picture's keys and then the text's; each sequence ends with a separate masked block. If
the text needs no result it has no tiles; the kernel is the same, with the picture's queries in
place of the text's. The longer loop comes first. Both loops are pipelined, and the pipeline is
filled again between them.
"""

import math
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.attention.gpu import alignment
from fastdiff.kernels.attention.launches import LaunchConfig, stream, streams
from fastdiff.kernels.attention.tiles import LOG2E, begin, flash, head_at, parts, write
from fastdiff.kernels.contract import Launch, Launcher, power_parts
from fastdiff.kernels.joint_attention.spec import Arguments
from fastdiff.kernels.tuned import tunable


@triton.jit(do_not_specialize=["L", "T", "H", "text_bias_sb"])
def _joint_kernel(
    q_ptr, k_ptr, v_ptr, text_q_ptr, text_k_ptr, text_v_ptr, text_bias_ptr, L, T, H,
    q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, v_sb, v_sl, v_sh,
    text_q_sb, text_q_sl, text_q_sh, text_k_sb, text_k_sl, text_k_sh,
    text_v_sb, text_v_sl, text_v_sh, text_bias_sb, out_ptr, text_out_ptr, ALIGN: tl.constexpr,
    SCALE: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr, TEXT_TAIL: tl.constexpr,
):  # fmt: skip
    """Each program does QUERIES queries of one head, of the picture or of the text."""
    tile = tl.program_id(0)
    head = (tl.program_id(1) % H).to(tl.int64)
    sample = (tl.program_id(1) // H).to(tl.int64)
    length = L
    tiles = tl.cdiv(L, QUERIES)
    if tile >= tiles:
        tile -= tiles
        length = T
        q_ptr = text_q_ptr
        q_sb = text_q_sb
        q_sl = text_q_sl
        q_sh = text_q_sh
        out_ptr = text_out_ptr
    start = tile.to(tl.int64) * QUERIES
    left = length - start
    q_ptr, q_sl = head_at(q_ptr, sample, head, q_sb, q_sh, q_sl, ALIGN)
    k_ptr, k_sl = head_at(k_ptr, sample, head, k_sb, k_sh, k_sl, ALIGN)
    v_ptr, v_sl = head_at(v_ptr, sample, head, v_sb, v_sh, v_sl, ALIGN)
    queries = tl.arange(0, QUERIES)
    q = parts(q_ptr + start * q_sl, queries, q_sl, left, K, P0, P1)
    state = flash(
        begin(QUERIES, P0, P1), q, k_ptr, v_ptr, None, queries, left, L,
        k_sl, v_sl, 0, 0, SCALE, K, P0, P1, KEYS, TAIL, False,
    )  # fmt: skip
    text_k_ptr, text_k_sl = head_at(
        text_k_ptr, sample, head, text_k_sb, text_k_sh, text_k_sl, ALIGN
    )
    text_v_ptr, text_v_sl = head_at(
        text_v_ptr, sample, head, text_v_sb, text_v_sh, text_v_sl, ALIGN
    )
    if text_bias_ptr is not None:
        text_bias_ptr += sample * text_bias_sb
    peak, total, out0, out1 = flash(
        state, q, text_k_ptr, text_v_ptr, text_bias_ptr, queries, left, T,
        text_k_sl, text_v_sl, 0, 1, SCALE, K, P0, P1, KEYS, TEXT_TAIL, False,
    )  # fmt: skip
    out_ptr += ((sample * length + start) * H + head) * K
    write(out_ptr, (out0, out1), total, queries, H * K, left, K, P0, P1)


@tunable("joint_attention")
def pick(K: int, size: int, arch: int) -> LaunchConfig:
    """The launch for heads K wide, `size` bytes per element: that of `attention`, except that 4
    warps do at most 64 queries. With 128, the second loop beside so many accumulators spills 32
    bytes on sm_90. With 64 queries an SM holds three blocks, with 8 warps only one."""
    own = stream(K, size, arch)
    return replace(own, queries=64) if (own.queries, own.num_warps) == (128, 4) else own


def candidates(K: int, size: int, arch: int) -> tuple[LaunchConfig, ...]:
    """Launches for a tuner to try, `pick`'s first."""
    return tuple(dict.fromkeys((pick(K, size, arch), *streams(K, size, arch))))


def plan(arch: int, a: Arguments) -> tuple[tuple[Launch, ...], tuple[Tensor, Tensor]]:
    """The launch for q, k, v [B, L, H, K] and the text's [B, T, H, K], and its outputs."""
    (B, L, H, K), T = a.q.shape, a.text_k.shape[1]
    states = {"q": a.q, "k": a.k, "v": a.v, "text_q": a.q if a.text_q is None else a.text_q}
    states |= {"text_k": a.text_k, "text_v": a.text_v}
    align, vector = alignment(K, *states.values())
    arguments: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in states.items()}
    arguments |= {"text_bias_ptr": a.text_bias, "L": L, "T": T, "H": H}
    for name, tensor in states.items():
        arguments |= zip((f"{name}_s{axis}" for axis in "blh"), tensor.stride(), strict=False)
    bias = a.text_bias
    arguments["text_bias_sb"] = 0 if bias is None or bias.ndim == 1 else bias.stride(0)
    out, text_out = (
        a.q.new_empty(a.q.shape),
        a.q.new_empty(0 if a.text_q is None else a.text_q.shape),
    )
    arguments |= {"out_ptr": out, "text_out_ptr": out if a.text_q is None else text_out}
    config, (P0, P1) = pick(K, a.q.element_size(), arch), power_parts(K, 16)
    scale = (1.0 / math.sqrt(K) if a.scale is None else a.scale) * LOG2E.value
    constants: dict[str, Any] = {"ALIGN": align, "SCALE": scale, "K": K, "P0": P0, "P1": P1}
    constants |= {"QUERIES": config.queries, "KEYS": config.keys}
    constants |= {"TAIL": L % config.keys != 0, "TEXT_TAIL": T % config.keys != 0}
    tiles = triton.cdiv(L, config.queries)
    tiles += 0 if a.text_q is None else triton.cdiv(T, config.queries)
    how = (config.num_warps, config.num_stages, vector)
    return (Launch(_joint_kernel, arguments, constants, (tiles, B * H), *how),), (out, text_out)


run = Launcher(Arguments, plan)
