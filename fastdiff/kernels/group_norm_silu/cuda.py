"""CUDA implementation of `group_norm_silu` (`csrc/cuda/`): one read and one write.

A cluster of thread blocks keeps whole groups of a picture in shared memory between the two. It has
not been measured on a GPU, so nothing chooses it yet. `implementation("group_norm_silu", "cuda")`
runs it if fastdiff was built with `FASTDIFF_CUDA=ON`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.contract import architecture
from fastdiff.kernels.dispatch import NATIVE, expects
from fastdiff.kernels.group_norm_silu.spec import Arguments
from fastdiff.kernels.occupancy import SMS

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CLUSTERS = {90: (1, 2, 4, 8, 16), 100: (1, 2, 4, 8, 16)}
"""How many blocks can share a picture's rows, by architecture; on others only one."""
THREADS = 512  # per block, as in the kernel
SEGMENT = 128  # bytes of a row per tile: a cache line
PROGRAMS = 132  # one block for every SM of an H100; more only if the slabs would not fit


@dataclass(frozen=True)
class LaunchConfig:
    """Groups per tile, thread blocks that share its pixels, pixels per block, elements per load,
    bytes of shared memory per block."""

    groups: int
    cluster: int
    rows: int
    lanes: int
    shared: int


def pick(
    B: int, L: int, W: int, G: int, size: int, arch: int, aligned: bool = True
) -> LaunchConfig | None:
    """The launch for B pictures of L pixels in G groups of W channels of `size` bytes. None if a
    tile does not fit the shared memory of the largest cluster.

    aligned: all addresses are multiples of 16 bytes, as is x's bytes per pixel if a second picture
    follows.
    """
    if arch not in SMS or B >= 1 << 16:  # the limit of a grid's y
        return None
    counts = [n for n in range(1, G + 1) if G % n == 0]
    wide = [n for n in counts if n * W * size >= SEGMENT] or [G]
    whole = [n for n in wide if aligned and n * W * size % 16 == 0]
    groups, lanes = (whole or wide)[0], 16 // size if whole else 1
    columns = groups * W // lanes
    if max(columns, groups) > THREADS:
        return None

    best = None
    for cluster in CLUSTERS.get(arch, (1,)):
        rows = -(-L // cluster)
        shared = _shared_bytes(rows, groups, W, size, lanes)
        filled = best is not None and B * (G // groups) * best.cluster >= PROGRAMS
        if filled or (best is not None and rows < THREADS // columns):
            break
        if shared <= (SMS[arch].shared - 1) * 1024:
            best = LaunchConfig(groups, cluster, rows, lanes, shared)
    return best


def _shared_bytes(rows: int, groups: int, W: int, size: int, lanes: int) -> int:
    """The slab in whole vectors; 3 floats per group; 2 per lane and 3 per thread."""
    slab = -(-rows * groups * W * size // 16) * 16
    return slab + groups * 12 + THREADS * (lanes * 8 + 12)


def start(call: Callable[..., None], arch: int, a: Arguments) -> tuple[Tensor, Tensor]:
    """call(dtype, vector, addresses, sizes, eps, silu) for the op's arguments; returns its outputs.

    Raises ValueError for arguments that the kernel does not take or `pick` finds no launch for.
    """
    if a.scale_shift is not None or a.act == "gelu":
        raise ValueError(
            f"group_norm_silu: got act {a.act!r}{'' if a.scale_shift is None else ', scale_shift'};"
            " the CUDA kernel takes none or silu, and no scale_shift; use 'triton'"
        )
    if a.summed and (a.beside is not None or a.residual is None):
        raise ValueError(
            "group_norm_silu: got keep, or beside with residual; the CUDA kernel returns the sum"
            " of x and residual alone; use 'triton'"
        )
    B, Y, X, C = a.x.shape
    C2 = 0 if a.beside is None else a.beside.shape[-1]
    if a.x.dtype not in DTYPES or not a.x.is_contiguous():
        raise ValueError(
            f"group_norm_silu: x is {a.x.dtype} with strides {a.x.stride()}; expected a contiguous"
            f" one of {', '.join(map(str, DTYPES))}"
        )
    copies = B if a.beside is None else a.beside.shape[0]
    expects("group_norm_silu: residual", a.residual, a.x, (B, Y, X, C))
    expects("group_norm_silu: beside", a.beside, a.x, (copies, Y, X, C2))
    expects("group_norm_silu: row", a.row, a.x, (B, C))
    expects("group_norm_silu: shift", a.shift, a.x, (C,))
    for name, part in {"weight": a.weight, "bias": a.bias}.items():
        expects(f"group_norm_silu: {name}", part, a.x, (C + C2,))
    y = a.x.new_empty((B, Y, X, C + C2))
    total = a.x.new_empty(0 if a.residual is None else a.x.shape)
    if y.numel() == 0:
        return y, total

    tensors = (a.x, a.residual, a.beside, a.row, a.shift, a.weight, a.bias, y, total)
    addresses = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    wide = (*addresses[:3], *addresses[-2:], C2 and C * a.x.element_size())
    config = pick(
        *(B, Y * X, (C + C2) // a.groups, a.groups, a.x.element_size(), arch),
        aligned=all(bytes_ % 16 == 0 for bytes_ in wide),
    )
    if config is None:
        raise ValueError(
            f"group_norm_silu: {a.x.dtype} {list(y.shape)} in {a.groups} groups does not fit into"
            f" the shared memory of a cluster of sm_{arch}, or that is unknown; use 'triton'"
        )
    ld_row = 0 if a.row is None else a.row.stride(0)
    tile = ((C + C2) // a.groups, config.groups, config.cluster, config.rows)
    sizes = (ld_row, B, copies, Y * X, C, C2, *tile)
    call(DTYPES[a.x.dtype], config.lanes > 1, addresses, sizes, a.eps, a.act == "silu")
    return y, total


def run(a: Arguments) -> tuple[Tensor, Tensor]:
    """The op on CUDA tensors; RuntimeError if fastdiff was built without CUDA."""
    if not hasattr(NATIVE, "cuda_group_norm_silu"):
        raise RuntimeError(
            "group_norm_silu: this fastdiff was built without its CUDA kernels; install it with"
            " `pip install --config-settings=cmake.define.FASTDIFF_CUDA=ON .`"
        )
    if not a.x.is_cuda:
        raise ValueError(
            f"group_norm_silu: x is on {a.x.device}; the CUDA kernel takes CUDA tensors"
        )
    stream = torch.cuda.current_stream(a.x.device).cuda_stream

    def call(*numbers: Any) -> None:
        NATIVE.cuda_group_norm_silu(*numbers, a.x.device.index, stream)

    with torch.cuda.device(a.x.device):  # current only until the kernel has started
        return start(call, architecture(a.x), a)
