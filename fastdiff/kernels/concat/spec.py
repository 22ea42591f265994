"""Contract of `concat`: torch only."""

from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.contract import Case, KernelSpec


def reference(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second], dim=-1)


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def picture(channels: int) -> Tensor:
        shape = (case.B, case.Y, case.X, channels)
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    return {"first": picture(case.C), "second": picture(case.C2)}


SPEC = KernelSpec(
    name="concat",
    schema="(Tensor first, Tensor second) -> Tensor",
    reference=reference,
    inputs=inputs,
    cases=(
        Case("demo-16", B=2, Y=16, X=16, C=96, C2=64),
        Case("sd15-16", B=2, Y=16, X=16, C=1280, C2=640),
        Case("odd", B=3, Y=5, X=7, C=33, C2=1),
    ),
    bytes=lambda c, size: size * 2 * c.B * c.Y * c.X * (c.C + c.C2),
    flops=lambda c: 0,
)
