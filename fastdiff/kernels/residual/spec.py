"""Contract of `residual`; imports only torch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.contract import Case, KernelSpec


@dataclass(slots=True)
class Arguments:
    """The op's arguments; see its public function."""

    x: Tensor
    other: Tensor | None = None
    shift: Tensor | None = None
    enlarge: int = 1
    gate: Tensor | None = None
    scale: float = 1.0
    limit: float = 0.0


def formula(a: Arguments) -> Tensor:
    total = a.x if a.shift is None else a.x + a.shift
    if a.other is not None:
        total = total + (a.other if a.gate is None else a.gate.reshape(_of_samples(a.x)) * a.other)
    if a.scale != 1.0:
        total = total * a.scale
    if a.limit:
        total = total.clamp(-a.limit, a.limit)
    if a.enlarge > 1:
        total = total.repeat_interleave(a.enlarge, 1).repeat_interleave(a.enlarge, 2)
    return total.clone() if total is a.x else total


def _of_samples(x: Tensor) -> tuple[int, ...]:
    """The shape that broadcasts a row per sample over all pixels of x [B, ..., C]."""
    return (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    middle = (case.X,) if case.get("tokens") else (case.Y, case.X)
    shape = (case.B, *middle, case.C)
    return {
        "x": normal(*shape),
        "other": normal(*shape) if case.get("other", True) else None,
        "shift": normal(case.C) if case.get("shift", True) else None,
        "enlarge": case.get("enlarge", 1),
        "gate": normal(case.B, 3 * case.C)[:, case.C : 2 * case.C] if case.get("gated") else None,
        "scale": case.get("scale", 1.0),
        "limit": case.get("limit", 0.0),
    }


def _operands(case: Case) -> tuple[int, int]:
    """The elements of x, and the number of operations on each."""
    added = case.get("other", True) + case.get("shift", True) + case.get("gated", False)
    return case.B * case.Y * case.X * case.C, added + ("scale" in case.sizes)


def moved(case: Case, size: int) -> int:
    elements, _ = _operands(case)
    pictures = 1 + int(case.get("other", True)) + case.get("enlarge", 1) ** 2
    rows = int(case.get("shift", True)) + case.B * int(case.get("gated", False))
    return int(size * (elements * pictures + case.C * rows))


def operations(case: Case) -> int:
    elements, added = _operands(case)
    return elements * added


CASES = (
    # the last resnet of a level, before its down- or upsampling convolution
    Case("sd15-32-down", B=2, Y=32, X=32, C=640),
    Case("sd15-16-up", B=2, Y=16, X=16, C=1280, enlarge=2),
    Case("sdxl-64-up", B=1, Y=64, X=64, C=640, enlarge=2),
    Case("vae-up", B=1, Y=64, X=64, C=256, enlarge=2),
    Case("demo-8-up", B=2, Y=8, X=8, C=96, enlarge=2),
    Case("sd15-tokens", B=2, Y=1, X=1024, C=640, shift=False, tokens=True),
    # SD3.5-medium: between its two attentions, at 512²
    Case("sd35-tokens", B=2, Y=1, X=1024, C=1536, shift=False, tokens=True, gated=True),
    # difficult: channels that do not fill a vector, enlarging by no power of two, one pixel
    Case("odd", B=3, Y=9, X=5, C=37, enlarge=3),
    Case("odd-gated", B=3, Y=5, X=3, C=37, enlarge=2, gated=True),
    Case("no-bias", B=1, Y=7, X=3, C=40, shift=False),
    Case("no-residual", B=1, Y=5, X=4, C=72, other=False, enlarge=2),
    Case("odd-scaled", B=3, Y=5, X=3, C=37, enlarge=2, scale=0.7071),
    Case("odd-limited", B=2, Y=1, X=5, C=37, shift=False, tokens=True, gated=True, limit=0.5),
    Case("alone", B=1, Y=1, X=1, C=8, other=False, shift=False),
)

SPEC = KernelSpec(
    name="residual",
    arguments=Arguments,
    formula=formula,
    inputs=inputs,
    cases=CASES,
    bytes=moved,
    flops=operations,
)
