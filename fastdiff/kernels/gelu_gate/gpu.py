"""Triton implementation of `gelu_gate`.

Each program reads the value and the gate of ROWS x COLUMNS outputs, in loads of 16 bytes.
"""

import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.contract import Launch, Launcher
from fastdiff.kernels.dispatch import expects
from fastdiff.kernels.gelu_gate.spec import ACTIVATIONS, Arguments
from fastdiff.kernels.tuned import tunable


@triton.jit
def gelu(gate):
    """The exact (erf) GELU of an fp32 tile.

    gelu(g) = max(g, 0) - |g| Phi(-|g|), where log2 Phi(-t) is our own fit of degree 9 on [0, 7]:
    Phi is off by at most 1.1e-8, with rounding gelu(g) by 7.8e-8 |g| (torch's fp32 by 3.5e-7 |g|).
    Beyond 7, Phi(-7) = 1.3e-12 is used. It takes half the instructions of erf, which selects one of
    two polynomials for each element: 8 moves of coefficients each.
    """
    t = tl.minimum(tl.abs(gate), 7.0)
    p = t * 1.9589519e-07 - 4.8470382e-06
    p = p * t + 4.6984430e-05
    p = p * t - 1.9862303e-04
    p = p * t - 1.3096350e-04
    p = p * t + 7.0697577e-03
    p = p * t - 5.2504433e-02
    p = p * t - 4.5920527e-01
    p = p * t - 1.1511055
    p = p * t - 1.0
    positive = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive - t * tl.exp2(p)


@triton.jit(do_not_specialize=["M", "N", "h_sm"])
def _gelu_gate_kernel(
    h_ptr, bias_ptr, M, N, h_sm, out_ptr,
    ALIGN: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """N and the row stride are multiples of ALIGN; dividing and multiplying by it lets the compiler
    know."""
    N, h_sm = N // ALIGN * ALIGN, h_sm // ALIGN * ALIGN
    tiles = tl.cdiv(N, COLUMNS)
    first = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < M - first) & (columns < N)[None, :]
    h_at = h_ptr + first * h_sm + rows * h_sm + columns[None, :]
    value = tl.load(h_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(h_at + N, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias_at = bias_ptr + columns
        value += tl.load(bias_at, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias_at + N, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if SILU == 2:  # the first half is the gate
        value *= gate * tl.sigmoid(value)
    elif SILU == 1:
        value *= gate * tl.sigmoid(gate)
    else:
        value *= gelu(gate)
    tl.store(out_ptr + first * N + rows * N + columns[None, :], value, mask=inside)


@dataclass(frozen=True)
class LaunchConfig:
    """Rows and columns of a program's outputs, warps."""

    rows: int
    columns: int
    num_warps: int


CONFIGS = (
    # 256 columns divide the 1280, 2560 and 5120 of SD1.5 and SDXL; 16 outputs per thread are four
    # 16-byte loads in flight, with registers for all warps of an SM
    LaunchConfig(8, 256, 4),
    LaunchConfig(4, 256, 4),
    LaunchConfig(4, 512, 4),
    LaunchConfig(2, 256, 2),
    LaunchConfig(16, 256, 8),
)
INTERPRETED = (LaunchConfig(256, 256, 1),)  # its time is per operation, whatever the size


@tunable("gelu_gate")
def pick(M: int, N: int, size: int, arch: int) -> LaunchConfig:
    """The launch for M rows of N outputs of `size` bytes; not measured, the same for all GPUs."""
    return candidates(M, N, size, arch)[0]


def candidates(M: int, N: int, size: int, arch: int) -> tuple[LaunchConfig, ...]:
    """Launches for a tuner to try, the default first."""
    return CONFIGS if arch else INTERPRETED


def _rows_of(h: Tensor) -> Tensor:
    """h [..., K] as [M, K] without a copy; ValueError if its strides do not allow that."""
    try:
        flat = h.view(-1, h.shape[-1])
    except RuntimeError:
        flat = None
    if flat is None or flat.stride(1) != 1:
        raise ValueError(
            f"gelu_gate: h is {list(h.shape)} with strides {h.stride()}; the kernel takes rows of"
            " contiguous elements, one stride apart"
        )
    return flat


def plan(arch: int, a: Arguments) -> tuple[tuple[Launch, ...], Tensor]:
    """The launch for h [..., 2N], and the output [..., N] it writes."""
    flat, N = _rows_of(a.h), a.h.shape[-1] // 2
    M, size = flat.shape[0], a.h.element_size()
    expects("gelu_gate: bias", a.bias, a.h, (2 * N,))
    align = math.gcd(16 // size, N, flat.stride(0))
    config = pick(M, N, size, arch)
    out = a.h.new_empty((*a.h.shape[:-1], N))
    arguments: dict[str, Any] = {"h_ptr": a.h, "bias_ptr": a.bias, "M": M, "N": N}
    arguments |= {"h_sm": flat.stride(0), "out_ptr": out}
    constants = {"ALIGN": align, "SILU": [*ACTIVATIONS].index(a.act)}
    constants |= {"ROWS": config.rows, "COLUMNS": config.columns}
    grid = (triton.cdiv(M, config.rows) * triton.cdiv(N, config.columns),)
    launch = Launch(
        _gelu_gate_kernel, arguments, constants, grid, config.num_warps, vector=align * size
    )
    return (launch,), out


run = Launcher(Arguments, plan)
