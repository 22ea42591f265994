"""Contract of `linear`; imports only torch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.contract import Case, KernelSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(slots=True)
class Arguments:
    """The op's arguments; see its public function."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    act: str = "none"
    residual: Tensor | None = None


def work(a: Arguments) -> tuple[str, tuple[int, ...]]:
    columns, inner = a.weight.shape
    return a.act, (a.x.numel() // inner, inner, columns)


def formula(a: Arguments) -> Tensor:
    return plus(ACTIVATIONS[a.act](F.linear(a.x, a.weight, a.bias)), a.residual)


def plus(y: Tensor, residual: Tensor | None) -> Tensor:
    """y + residual, contiguous; the residual may have half as many pictures."""
    if residual is not None:
        y = (y.reshape(-1, *residual.shape) + residual).view(y.shape)
    return y.contiguous()


def library(a: Arguments) -> Tensor:
    """The formula on a GPU: cuBLASLt applies the tanh GELU to its sums in the same launch. On a CPU
    the same call would compute the exact GELU instead."""
    if a.act != "gelu_tanh" or a.bias is None:
        return formula(a)
    flat = a.x.reshape(-1, a.x.shape[-1])
    y: Tensor = torch._addmm_activation(a.bias, flat, a.weight.t(), use_gelu=True)
    return plus(y.view(*a.x.shape[:-1], a.weight.shape[0]), a.residual)


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    L, D, N = case.L, case.D, case.N
    packed = normal(D, N + case.get("beside", 0))[:, :N].t() / D**0.5  # columns of a wider buffer
    return {
        "x": normal(case.B, L, D),
        "weight": packed if case.get("packed", True) else packed.contiguous(),
        "bias": normal(N) if case.get("bias", True) else None,
        "act": case.get("act", "none"),
        "residual": normal(case.B // case.get("parts", 1), L, N) if case.get("residual") else None,
    }


CASES = (
    Case("demo-qkv", B=2, L=256, D=64, N=192, bias=False),
    Case("demo-out", B=2, L=64, D=384, N=96, residual=True),
    Case("demo-time", B=1, L=2, D=64, N=256, act="silu"),
    Case("demo-text", B=2, L=24, D=128, N=1120, bias=False),
    Case("sdxl-out", B=1, L=77, D=2560, N=640, residual=True),
    Case("sd3-ff", B=2, L=9, D=1536, N=6144, act="gelu_tanh"),  # only a few of its 4096 tokens
    Case("sd3-time", B=1, L=2, D=256, N=1536, act="silu"),
    Case("odd", B=3, L=7, D=33, N=37, residual=True),
    Case("odd-gelu", B=3, L=7, D=33, N=37, act="gelu", residual=True),
    Case("odd-tanh", B=4, L=5, D=24, N=31, act="gelu_tanh", bias=False, residual=True, parts=2),
    Case("odd-long", B=1, L=130, D=391, N=70),  # more products and rows than one pass takes
    Case("columns", B=2, L=24, D=40, N=48, beside=32, bias=False),
    Case("guided", B=4, L=9, D=33, N=37, residual=True, parts=2),
    # weights of more than 1 MiB in bfloat16, too
    Case("few-rows", B=2, L=3, D=393, N=1390, residual=True),
    Case("few-rows-one", B=1, L=1, D=513, N=1040, act="gelu", bias=False),
    Case("one-row", B=1, L=1, D=1, N=1),
    Case("unpacked", B=1, L=16, D=32, N=64, packed=False),
)


def moved(case: Case, size: int) -> int:
    rows, D, N = case.B * case.L, case.D, case.N
    added = N * case.get("bias", True)
    added += rows // case.get("parts", 1) * N if case.get("residual") else 0
    return int(size * (rows * (D + N) + D * N + added))


SPEC = KernelSpec(
    name="linear",
    arguments=Arguments,
    formula=formula,
    inputs=inputs,
    work=work,
    cases=CASES,
    bytes=moved,
    flops=lambda c: 2 * c.B * c.L * c.D * c.N,
)
