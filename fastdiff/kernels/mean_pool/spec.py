"""Contract of `mean_pool`; imports only torch."""

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


def formula(a: Arguments) -> Tensor:
    return F.avg_pool2d(a.x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).contiguous()


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    shape = (case.B, case.Y, case.X, case.C)
    return {"x": torch.randn(*shape, generator=generator, device=device).to(dtype)}


SPEC = KernelSpec(
    name="mean_pool",
    arguments=Arguments,
    formula=formula,
    inputs=inputs,
    cases=(
        Case("adm-64", B=2, Y=64, X=64, C=192),
        Case("odd", B=3, Y=5, X=7, C=37),
        Case("two-pixels", B=1, Y=2, X=2, C=8),
    ),
    bytes=lambda c, size: size * c.B * c.C * (c.Y * c.X + (c.Y // 2) * (c.X // 2)),
    flops=lambda c: 0,
)
