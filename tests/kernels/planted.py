"""Tiny Triton kernels whose machine code is known beforehand, as ops that `table()` finds.

Only a separate process imports them: in the tests' own process kernels run in Triton's interpreter.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastdiff.kernels.contract import Case, KernelSpec, Launch, Launcher
from fastdiff.kernels.dispatch import KERNELS, Kernel


@triton.jit
def _copy_kernel(x_ptr, stride, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i * stride, tl.load(x_ptr + i * stride))


@triton.jit
def _gather_kernel(x_ptr, stride, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride))


@triton.jit
def _scale_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Uses the whole block twice, so the block stays in registers if there are enough."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i).to(tl.float32)
    tl.store(y_ptr + i, x / tl.sum(x))


@triton.jit
def _product_kernel(x_ptr, y_ptr, SIDE: tl.constexpr):
    i = tl.arange(0, SIDE)
    at = i[:, None] * SIDE + i[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x).to(x.dtype))


@dataclass
class Arguments:
    x: torch.Tensor


def plant(name, kernel, size, num_warps, stride=None, **constants):
    """Add an op of one launch on a vector of `size`, with FLOPs and bytes of a matrix product."""

    def plan(arch, a):
        y = torch.empty_like(a.x)
        integers = {} if stride is None else {"stride": stride}
        arguments = {"x_ptr": a.x, **integers, "y_ptr": y}
        return (Launch(kernel, arguments, constants, (1,), num_warps),), y

    spec = KernelSpec(
        name=name,
        arguments=Arguments,
        formula=lambda a: a.x,
        inputs=lambda case, dtype, device, generator: {"x": torch.empty(case.L, dtype=dtype)},
        cases=(Case("only", L=size),),
        bytes=lambda case, element: 2 * element * case.L,
        flops=lambda case: 2 * case.L**1.5,
    )
    launcher = Launcher(Arguments, plan)
    implementations = {"triton": lambda: launcher}
    KERNELS[name] = Kernel(spec, None, implementations, *[spec.reference] * 3)


# 1024 float16 numbers over 4 warps are 8 numbers, 16 bytes, a thread
plant("contiguous", _copy_kernel, 1024, 4, stride=1, BLOCK=1024)
plant("every third", _copy_kernel, 3072, 4, stride=3, BLOCK=1024)
plant("gathered", _gather_kernel, 3072, 4, stride=3, BLOCK=1024)
# 4096 numbers over a warp are 128 registers a thread; 16384 are 512, and a thread has at most 255
plant("kept", _scale_kernel, 4096, 1, BLOCK=4096)
plant("spilled", _scale_kernel, 16384, 1, BLOCK=16384)
plant("product", _product_kernel, 64 * 64, 4, SIDE=64)
PLANTED = ("contiguous", "every third", "gathered", "kept", "spilled", "product")
