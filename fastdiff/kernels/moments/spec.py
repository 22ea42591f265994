"""Contract of `moments`; imports only torch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.contract import Case, KernelSpec


@dataclass(slots=True)
class Arguments:
    """The op's arguments; see its public function."""

    x: Tensor
    slab: int


def formula(a: Arguments) -> Tensor:
    pixels = a.x.reshape(-1, a.x.shape[-1])
    pixels = pixels if pixels.dtype == torch.float64 else pixels.float()
    found = []
    for part in pixels.split(a.slab):
        mean = part.mean(0)
        rest = (part - mean).mean(0)
        square = (part - mean).square().sum(0) - rest.square() * len(part)
        found.append(torch.stack((mean, rest, square)))
    return torch.stack(found)


def fake(a: Arguments) -> Tensor:
    """Avoids the formula's loop over the slabs, of which a picture has hundreds."""
    channels = a.x.shape[-1]
    slabs = -(-(a.x.numel() // channels) // a.slab)
    dtype = torch.float64 if a.x.dtype == torch.float64 else torch.float32
    return a.x.new_empty((slabs, 3, channels), dtype=dtype)


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    x = torch.randn(1, case.Y, case.X, case.C, generator=generator, device=device)
    x = x * case.get("deviation", 1.0) + case.get("mean", 0.0)
    return {"x": x.to(dtype), "slab": case.slab}


def _slabs(case: Case) -> int:
    return int(-(-case.Y * case.X // case.slab))


CASES = (
    # a strip of SD1.5's and SDXL's decoder at each level
    Case("vae-256", Y=8, X=256, C=512, slab=128),
    Case("vae-1024", Y=2, X=1024, C=256, slab=256),
    Case("vae-2048", Y=1, X=2048, C=128, slab=512),
    # the demo pipeline
    Case("demo-vae", Y=16, X=64, C=32, slab=2048),
    # difficult: channels that do not fill a vector, a last slab of one pixel, one pixel, a far mean
    Case("odd", Y=9, X=5, C=37, slab=11),
    Case("one-pixel", Y=1, X=1, C=90, slab=7),
    Case("slabs-of-one", Y=3, X=2, C=8, slab=1),
    Case("far-mean", Y=16, X=16, C=56, slab=100, mean=1000.0, deviation=0.01),
)

SPEC = KernelSpec(
    name="moments",
    arguments=Arguments,
    formula=formula,
    inputs=inputs,
    cases=CASES,
    bytes=lambda c, size: size * c.Y * c.X * c.C + 4 * 3 * c.C * _slabs(c),
    flops=lambda c: 6 * c.Y * c.X * c.C,
    fake=fake,
)
