"""Contract of `linear`: torch only."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.contract import Case, KernelSpec

ACTIVATIONS = {"none": 0, "silu": 1, "geglu": 2}


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    y = F.linear(x, weight, bias)
    if act == "silu":
        y = F.silu(y)
    elif act == "geglu":
        value, gate = y.chunk(2, dim=-1)
        y = value * F.gelu(gate)
    if residual is not None:
        y = (y.reshape(-1, *residual.shape) + residual).view(y.shape)
    return y.contiguous()


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    L, D, N, act = case.L, case.D, case.N, case.get("act", "none")
    packed = normal(D, N + case.get("beside", 0))[:, :N].t() / D**0.5  # columns of a wider buffer
    return {
        "x": normal(case.B, L, D) * case.get("spread", 1.0),
        "weight": packed if case.get("packed", True) else packed.contiguous(),
        "bias": normal(N) if case.get("bias", True) else None,
        "act": act,
        "residual": normal(case.B // case.get("parts", 1), L, N // (1 + (act == "geglu")))
        if case.get("residual")
        else None,
    }


CASES = (
    Case("demo-qkv", B=2, L=256, D=64, N=192, bias=False),
    Case("demo-geglu", B=2, L=256, D=64, N=512, act="geglu", spread=3.0),
    Case("demo-out", B=2, L=64, D=384, N=96, residual=True),
    Case("demo-time", B=1, L=2, D=64, N=256, act="silu"),
    Case("demo-text", B=2, L=24, D=128, N=1120, bias=False),
    Case("sd15-geglu", B=2, L=64, D=1280, N=2560, act="geglu"),
    Case("sdxl-out", B=1, L=77, D=2560, N=640, residual=True),
    Case("odd", B=3, L=7, D=33, N=37, residual=True),
    Case("odd-geglu", B=1, L=5, D=31, N=82, act="geglu", residual=True),
    Case("columns", B=2, L=24, D=40, N=48, beside=32, bias=False),
    Case("guided", B=4, L=9, D=33, N=37, residual=True, parts=2),
    Case("one-row", B=1, L=1, D=1, N=1),
    Case("unpacked", B=1, L=16, D=32, N=64, packed=False, act="geglu"),
)

SPEC = KernelSpec(
    name="linear",
    schema=(
        '(Tensor x, Tensor weight, Tensor? bias=None, str act="none", Tensor? residual=None)'
        " -> Tensor"
    ),
    reference=reference,
    inputs=inputs,
    cases=CASES,
    bytes=lambda c, size: size * (c.B * c.L * (c.D + c.N) + c.D * c.N),
    flops=lambda c: 2 * c.B * c.L * c.D * c.N,
)
