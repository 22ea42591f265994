"""Contract of `geglu`; imports only torch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.contract import Case, KernelSpec
from fastdiff.kernels.gelu_gate.spec import SPEC as GATE


@dataclass(slots=True)
class Arguments:
    """The op's arguments; see its public function."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    act: str = "gelu"


def work(a: Arguments) -> tuple[str, tuple[int, ...]]:
    columns, inner = a.weight.shape
    return "", (a.x.numel() // inner, inner, columns // 2)


def formula(a: Arguments) -> Tensor:
    y: Tensor = GATE.reference(F.linear(a.x, a.weight, a.bias), act=a.act)
    return y


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    D, N = case.D, case.N
    x = normal(case.B, case.L, D + case.get("beside", 0))[..., :D] * case.get("spread", 1.0)
    return {
        "x": x.to(dtype),
        "weight": (normal(2 * N, D) / D**0.5).to(dtype),
        "bias": normal(2 * N).to(dtype) if case.get("bias", True) else None,
        "act": case.get("act", "gelu"),
    }


CASES = (
    # widths of SD1.5 at 512² and of SDXL, batch 2 (guidance), with some of the rows and columns
    Case("sd15-64-part", B=2, L=576, D=320, N=1280),
    Case("sd15-8-part", B=2, L=64, D=1280, N=512),
    Case("demo-16", B=2, L=256, D=64, N=256, spread=3.0),
    Case("demo-8", B=2, L=64, D=96, N=384, spread=3.0),
    # difficult
    Case("eights", B=2, L=9, D=40, N=56, beside=24),
    Case("odd", B=1, L=5, D=31, N=41, bias=False),
    Case("odd-silu-first", B=1, L=5, D=31, N=41, act="silu_first", spread=3.0),
    Case("odd-silu", B=2, L=5, D=31, N=41, bias=False, act="silu", spread=3.0),
    Case("few-rows", B=2, L=2, D=510, N=520),  # a weight of more than 1 MiB in bfloat16, too
    Case("one", B=1, L=1, D=1, N=1),
)

SPEC = KernelSpec(
    name="geglu",
    arguments=Arguments,
    formula=formula,
    inputs=inputs,
    work=work,
    cases=CASES,
    bytes=lambda c, size: (
        size * (c.B * c.L * (c.D + c.N) + 2 * c.N * (c.D + bool(c.get("bias", True))))
    ),
    flops=lambda c: 4 * c.B * c.L * c.D * c.N,
)
