"""Contract of `conv2d`; imports only torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.contract import Case, KernelSpec


@dataclass(slots=True)
class Arguments:
    """The op's arguments; see its public function."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: int
    padding: list[int]
    size: list[int] | None = None
    residual: Tensor | None = None


def work(a: Arguments) -> tuple[str, tuple[int, ...]]:
    B, Y, X, C = a.x.shape
    N, _, kernel, _ = a.weight.shape
    enlarged = "" if a.size is None else " enlarged"
    up_y, up_x = (Y, X) if a.size is None else a.size
    before, after = a.padding
    out = ((side + before + after - kernel) // a.stride + 1 for side in (up_y, up_x))
    kind = f"{kernel}x{kernel} stride {a.stride} padding {before} {after}{enlarged}"
    return kind, (B, *out, C, N)


def formula(a: Arguments) -> Tensor:
    return around(F.conv2d, a)


def around(
    convolve: Callable[[Tensor, Tensor, Tensor | None, int, int], Tensor], a: Arguments
) -> Tensor:
    """The op, with `convolve` (picture [B, C, Y, X], weight, bias, stride, padding) as its core."""
    picture = a.x.permute(0, 3, 1, 2)
    if a.size is not None:
        picture = F.interpolate(picture, size=list(a.size), mode="nearest")
    before, after = a.padding
    if before != after:
        picture, before = F.pad(picture, (before, after, before, after)), 0
    y = convolve(picture, a.weight, a.bias, a.stride, before).permute(0, 2, 3, 1)
    if a.residual is not None:
        y = y + a.residual
    return y.contiguous()


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    B, C, N, kernel, size = case.B, case.C, case.N, case.get("kernel", 3), case.get("size")
    weight = normal(kernel, kernel, C, N) / (kernel * C**0.5)
    weight = weight.permute(3, 2, 0, 1)  # [N, C, kernel, kernel] as `models.borrow` lays it out
    return {
        "x": normal(B, case.Y, case.X, C),
        "weight": weight if case.get("packed", True) else weight.contiguous(),
        "bias": normal(N) if case.get("bias", True) else None,
        "stride": case.get("stride", 1),
        "padding": list(_padding(case)),
        "size": list(size) if size else None,
        "residual": normal(B, *_made(case), N) if case.get("residual") else None,
    }


def _padding(case: Case) -> tuple[int, int]:
    half = case.get("kernel", 3) // 2
    before, after = case.get("padding", (half, half))
    return before, after


def _made(case: Case) -> tuple[int, int]:
    """The rows and columns of the output."""
    taken = sum(_padding(case)) - case.get("kernel", 3)
    rows, columns = case.get("size", (case.Y, case.X))
    stride = case.get("stride", 1)
    return (rows + taken) // stride + 1, (columns + taken) // stride + 1


def moved(case: Case, size: int) -> int:
    outputs = case.B * math.prod(_made(case)) * case.N
    outputs *= 1 + bool(case.get("residual"))
    weights = case.N * (case.get("kernel", 3) ** 2 * case.C + case.get("bias", True))
    return int(size * (case.B * case.Y * case.X * case.C + outputs + weights))


def operations(case: Case) -> int:
    each = 2 * case.get("kernel", 3) ** 2 * case.C
    return int(case.B * math.prod(_made(case)) * case.N * each)


CASES = (
    Case("demo-16", B=2, Y=16, X=16, C=64, N=64),
    Case("demo-16-cat", B=2, Y=16, X=16, C=160, N=64),
    Case("demo-8-residual", B=2, Y=8, X=8, C=96, N=96, residual=True),
    Case("demo-4", B=2, Y=4, X=4, C=192, N=96, residual=True),
    Case("demo-down", B=2, Y=16, X=16, C=64, N=64, stride=2),
    Case("demo-up", B=2, Y=8, X=8, C=96, N=96, size=(16, 16)),
    Case("demo-in", B=2, Y=16, X=16, C=4, N=64),
    Case("demo-out", B=2, Y=16, X=16, C=64, N=4),
    Case("sd15-16", B=2, Y=16, X=16, C=320, N=640),
    Case("sd15-8-shortcut", B=2, Y=8, X=8, C=640, N=320, kernel=1),
    Case("vae-out", B=1, Y=32, X=32, C=48, N=3),
    Case("vae-encoder-down", B=1, Y=17, X=24, C=32, N=48, stride=2, padding=(0, 1)),
    # difficult: odd sizes, columns that do not fill a vector, an enlargement by other than two
    Case("odd", B=3, Y=9, X=5, C=33, N=37, residual=True),
    Case("odd-many", B=2, Y=13, X=11, C=131, N=70),
    Case("odd-down", B=1, Y=33, X=17, C=40, N=24, stride=2, bias=False),
    Case("odd-up", B=1, Y=9, X=5, C=20, N=20, size=(17, 9)),
    Case("one-pixel", B=1, Y=1, X=1, C=16, N=48),
    Case("unpacked", B=2, Y=8, X=8, C=32, N=32, packed=False),
)

SPEC = KernelSpec(
    name="conv2d",
    arguments=Arguments,
    formula=formula,
    inputs=inputs,
    work=work,
    cases=CASES,
    bytes=moved,
    flops=operations,
)
