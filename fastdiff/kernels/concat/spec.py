"""Contract of `concat`; imports only torch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.contract import Case, KernelSpec


@dataclass(slots=True)
class Arguments:
    """The op's arguments; see its public function."""

    first: Tensor
    second: Tensor


def formula(a: Arguments) -> Tensor:
    parts = a.first.reshape(-1, a.second.shape[0], *a.first.shape[1:])
    both = torch.cat([parts, a.second.expand(len(parts), *a.second.shape)], dim=-1)
    return both.view(*a.first.shape[:-1], -1)


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def picture(batch: int, channels: int) -> Tensor:
        shape = (batch, case.Y, case.X, channels)
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    return {
        "first": picture(case.B, case.C),
        "second": picture(case.B // case.get("parts", 1), case.C2),
    }


SPEC = KernelSpec(
    name="concat",
    arguments=Arguments,
    formula=formula,
    inputs=inputs,
    cases=(
        Case("demo-16", B=2, Y=16, X=16, C=96, C2=64),
        Case("sd15-16", B=2, Y=16, X=16, C=1280, C2=640),
        Case("guided", B=4, Y=5, X=7, C=33, C2=3, parts=2),
        Case("odd", B=3, Y=5, X=7, C=33, C2=1),
    ),
    bytes=lambda c, size: (
        size * c.Y * c.X * (c.B * (2 * c.C + c.C2) + c.B // c.get("parts", 1) * c.C2)
    ),
    flops=lambda c: 0,
)
