"""Triton implementation of `geglu`: a matrix product whose epilogue gates.

The gate must meet its value. Rather than two products for the two halves of the weight, a program
does one, whose columns are taken alternately from both halves: rows of the weight are addressed one
by one anyway, so nothing is interleaved in memory, the matrix instructions are twice as wide (256
columns for wgmma), and value and gate of an output become neighbours in the registers of a thread.
The bias is what the sums begin with: added behind the products it is 64 values a thread more beside
all the sums, 128 on sm_100, which spilled there. Sums are fp32; fp32 inputs are multiplied in full
fp32, not TF32.
"""

import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.contract import Launch, Launcher
from fastdiff.kernels.dispatch import expects
from fastdiff.kernels.gelu_gate.gpu import gated, rows_of
from fastdiff.kernels.occupancy import multiprocessors
from fastdiff.kernels.tuned import tunable

GROUP = tl.constexpr(8)
"""Tiles of rows that walk over the columns together, so that both operands are found in L2."""


@triton.jit
def _tile(M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first row and column of this program."""
    walk = GROUP * tl.cdiv(N, COLUMNS)
    group = tl.program_id(0) // walk * GROUP
    place = tl.program_id(0) % walk
    height = tl.minimum(tl.cdiv(M, ROWS) - group, GROUP)
    return (group + place % height).to(tl.int64) * ROWS, place // height * COLUMNS


@triton.jit
def _geglu_kernel(
    x_ptr, weight_ptr, bias_ptr, M, N, D, x_sm, weight_sn, out_ptr,
    ALIGN: tl.constexpr, ALIGN_N: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A program does ROWS x COLUMNS outputs. D and the strides are multiples of ALIGN, N of
    ALIGN_N, which dividing and multiplying tells the compiler. Rows and columns that do not exist
    read the last ones, so that only a TAIL of D is masked in the loop."""
    D, N = D // ALIGN * ALIGN, N // ALIGN_N * ALIGN_N
    x_sm, weight_sn = x_sm // ALIGN * ALIGN, weight_sn // ALIGN * ALIGN
    first_row, first_column = _tile(M, N, ROWS, COLUMNS)
    rows = tl.minimum(tl.arange(0, ROWS), M - 1 - first_row)
    pair = tl.arange(0, 2 * COLUMNS)
    features = tl.minimum(first_column + pair // 2, N - 1) + pair % 2 * N.to(tl.int64)
    inner = tl.arange(0, INNER)
    x_at = x_ptr + first_row * x_sm + rows[:, None] * x_sm + inner[None, :]
    weight_at = weight_ptr + features[:, None] * weight_sn + inner[None, :]
    sums = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + features).to(tl.float32)[None, :]
    for start in range(0, D, INNER):
        if TAIL:
            inside = (inner < D - start)[None, :]
            x = tl.load(x_at, mask=inside, other=0.0)
            weight = tl.load(weight_at, mask=inside, other=0.0)
        else:
            x = tl.load(x_at)
            weight = tl.load(weight_at)
        sums = tl.dot(x, tl.trans(weight), sums, input_precision="ieee")
        x_at += INNER
        weight_at += INNER
    value, gate = tl.split(tl.reshape(sums, (ROWS, COLUMNS, 2)))
    rows = tl.arange(0, ROWS)[:, None]
    columns = first_column + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < M - first_row) & (columns < N)
    tl.store(out_ptr + first_row * N + rows * N + columns, gated(value, gate), mask=inside)


@dataclass(frozen=True)
class LaunchConfig:
    """Rows and columns of a program's outputs, inner width of a step, warps, pipeline stages."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


# the first where its tiles are many, the last where they are few; those between are for a tuner.
# 128 x 128 outputs are 128 x 256 sums, 128 registers of each of 256 threads: one block an SM.
# Smaller tiles multiply each byte from L2 less often.
CONFIGS = {
    "wgmma": (  # sm_90: 227 KiB of shared memory a block
        LaunchConfig(128, 128, 64, 8, 4),
        LaunchConfig(128, 128, 64, 8, 3),
        LaunchConfig(256, 64, 64, 8, 4),
        LaunchConfig(128, 64, 64, 8, 4),
        LaunchConfig(64, 128, 64, 4, 2),
        LaunchConfig(64, 128, 64, 4, 4),
    ),
    "tcgen05": (  # sm_100: the same; sums in 256 or 128 of the 512 columns of tensor memory
        LaunchConfig(128, 128, 64, 8, 4),
        LaunchConfig(128, 128, 64, 8, 3),
        LaunchConfig(128, 64, 64, 4, 4),
        LaunchConfig(128, 64, 64, 8, 4),
    ),
    "mma.sync": (  # sm_80: 163 KiB; sm_86, 89, 120: 99 KiB
        LaunchConfig(128, 128, 32, 8, 4),
        LaunchConfig(128, 128, 32, 8, 3),
        LaunchConfig(128, 64, 32, 4, 4),
        LaunchConfig(128, 64, 64, 8, 3),
        LaunchConfig(64, 64, 64, 8, 3),  # with 4 warps it spills on sm_120 (triton 3.6)
        LaunchConfig(64, 64, 32, 4, 4),
    ),
    # 2 to 8 bytes at a time, through registers: the larger tiles spill there
    "narrow": (LaunchConfig(64, 32, 32, 4, 2),),
    "fp32": (LaunchConfig(64, 32, 16, 8, 2),),  # fused multiply-adds in registers
    "interpreted": (LaunchConfig(128, 256, 64, 1, 1),),
}
KINDS = {0: "interpreted", 90: "wgmma", 100: "tcgen05"}  # the others are mma.sync


@tunable("geglu")
def pick(M: int, N: int, D: int, vector: int, size: int, arch: int) -> LaunchConfig:
    """Launch for M rows of N outputs of D inputs of `size` bytes, `vector` bytes at a load.

    Not measured. While twice as many tiles of half the size still start at once, they take half as
    long.
    """
    configs = candidates(M, N, D, vector, size, arch)
    tiles = triton.cdiv(M, configs[0].rows) * triton.cdiv(N, configs[0].columns)
    return configs[-1 if 2 * tiles <= multiprocessors(arch) else 0]


def candidates(
    M: int, N: int, D: int, vector: int, size: int, arch: int
) -> tuple[LaunchConfig, ...]:
    """What a tuner should try; none spills."""
    kind = KINDS.get(arch, "mma.sync")
    if arch and size == 4:
        kind = "fp32"
    elif arch and vector < 16:
        kind = "narrow"
    return CONFIGS[kind]


def plan(
    arch: int, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[tuple[Launch, ...], Tensor]:
    """The launch for x [..., D] and weight [2N, D], and the output [..., N] it writes."""
    flat, (N, D), size = rows_of("geglu: x", x), weight.shape, x.element_size()
    M, N = flat.shape[0], N // 2
    if weight.stride(1) != 1:
        raise ValueError(
            f"geglu: weight has strides {weight.stride()}; the kernel takes rows whose elements"
            " lie side by side, as torch.nn.Linear stores them"
        )
    expects("geglu: bias", bias, x, (2 * N,))
    out = x.new_empty((*x.shape[:-1], N))
    strides = {"x_sm": flat.stride(0), "weight_sn": weight.stride(0)}
    align, align_n = math.gcd(16 // size, D, *strides.values()), math.gcd(16 // size, N)
    config = pick(M, N, D, align * size, size, arch)
    arguments: dict[str, Any] = {"x_ptr": x, "weight_ptr": weight, "bias_ptr": bias}
    arguments |= {"M": M, "N": N, "D": D} | strides | {"out_ptr": out}
    constants = {"ALIGN": align, "ALIGN_N": align_n, "TAIL": D % config.inner != 0}
    constants |= {"ROWS": config.rows, "COLUMNS": config.columns, "INNER": config.inner}
    grid = (triton.cdiv(M, config.rows) * triton.cdiv(N, config.columns),)
    vector = min(align, align_n) * size
    launch = Launch(
        _geglu_kernel, arguments, constants, grid, config.num_warps, config.num_stages, vector
    )
    return (launch,), out


run = Launcher(plan)
