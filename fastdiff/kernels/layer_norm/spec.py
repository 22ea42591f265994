"""Contract of `layer_norm`: torch only."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.contract import Case, KernelSpec


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x = normal(case.B, case.L, case.D) * case.get("deviation", 1.0) + case.get("mean", 0.0)
    return {
        "x": x.to(dtype),
        "weight": (normal(case.D) * 0.2 + 1).to(dtype),
        "bias": (normal(case.D) * 0.2).to(dtype),
        "eps": 1e-5,
    }


SPEC = KernelSpec(
    name="layer_norm",
    schema="(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    reference=reference,
    inputs=inputs,
    cases=(
        Case("demo", B=2, L=256, D=64),
        Case("sd15-64", B=2, L=4096, D=320),
        Case("sdxl-32", B=2, L=1024, D=1280),
        Case("odd", B=3, L=77, D=1001),
        Case("narrow", B=1, L=5, D=3),
        Case("far-mean", B=1, L=64, D=96, mean=1000.0, deviation=0.01),
    ),
    bytes=lambda c, size: size * 2 * c.B * c.L * c.D,
    flops=lambda c: 8 * c.B * c.L * c.D,
)
