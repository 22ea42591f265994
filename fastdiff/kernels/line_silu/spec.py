"""Contract of `line_silu`; imports only torch."""

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
    line: Tensor
    silu: bool = True


def formula(a: Arguments) -> Tensor:
    centre, slope, offset = a.line
    y = (a.x - centre) * slope + offset
    return (F.silu(y) if a.silu else y).to(a.x.dtype).contiguous()


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    x = torch.randn(1, case.Y, case.X, case.C, generator=generator, device=device)
    line = torch.randn(3, case.C, generator=generator, device=device)
    mean, deviation = case.get("mean", 0.0), case.get("deviation", 1.0)
    line[0] = line[0] * deviation + mean
    line[1] = (line[1] * 0.2 + 1) / deviation
    return {
        "x": (x * deviation + mean).to(dtype),
        "line": line.double() if dtype == torch.float64 else line,
        "silu": case.get("silu", True),
    }


CASES = (
    # a strip of SD1.5's and SDXL's decoder at each level
    Case("vae-256", Y=8, X=256, C=512),
    Case("vae-1024", Y=2, X=1024, C=256),
    Case("vae-2048", Y=1, X=2048, C=128),
    # the demo pipeline
    Case("demo-vae", Y=16, X=64, C=32),
    # difficult: channels that do not fill a vector, one pixel, a mean far from zero
    Case("odd", Y=9, X=5, C=37),
    Case("plain", Y=7, X=3, C=40, silu=False),
    Case("one-pixel", Y=1, X=1, C=90),
    Case("far-mean", Y=16, X=16, C=56, mean=1000.0, deviation=0.5, silu=False),
)

SPEC = KernelSpec(
    name="line_silu",
    arguments=Arguments,
    formula=formula,
    inputs=inputs,
    cases=CASES,
    bytes=lambda c, size: 2 * size * c.Y * c.X * c.C + 4 * 3 * c.C,
    flops=lambda c: c.Y * c.X * c.C * (3 + 4 * c.get("silu", True)),
)
