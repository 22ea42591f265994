"""Contract of `group_norm_silu`; imports only torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.concat.spec import SPEC as CONCAT
from fastdiff.kernels.contract import Case, KernelSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
}


@dataclass(slots=True)
class Arguments:
    """The op's arguments; see its public function."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    act: str
    row: Tensor | None = None
    residual: Tensor | None = None
    beside: Tensor | None = None
    shift: Tensor | None = None
    scale_shift: Tensor | None = None
    keep: bool = False

    @property
    def summed(self) -> bool:
        """Whether t is returned."""
        return self.keep or self.residual is not None


def summed(
    x: Tensor,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    beside: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The normalised tensor [B, Y, X, C + C2]."""
    total = x
    if shift is not None:
        total = total + shift
    if row is not None:
        total = total + row[:, None, None, :]
    if residual is not None:
        total = total + residual
    return total if beside is None else CONCAT.reference(total, beside)


def formula(a: Arguments) -> tuple[Tensor, Tensor]:
    t = summed(a.x, a.row, a.residual, a.beside, a.shift)
    y = F.group_norm(t.permute(0, 3, 1, 2), a.groups, a.weight, a.bias, a.eps).permute(0, 2, 3, 1)
    if a.scale_shift is not None:
        scale, offset = a.scale_shift[:, None, None, :].chunk(2, -1)
        y = y * (1 + scale) + offset
    y = ACTIVATIONS[a.act](y).contiguous()
    return y, t.clone() if a.summed else a.x.new_empty(0)


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    B, Y, X, C, C2 = case.B, case.Y, case.X, case.C, case.get("C2", 0)
    x = torch.randn(B, Y, X, C, generator=generator, device=device)
    x = (x * case.get("deviation", 1.0) + case.get("mean", 0.0)).to(dtype)
    if case.get("outlier"):
        x[:, 0, 0, :] = case.outlier
    return {
        "x": x,
        "weight": normal(C + C2) * 0.2 + 1,
        "bias": normal(C + C2) * 0.2,
        "groups": case.G,
        "eps": case.get("eps", 1e-5),
        "act": case.get("act", "silu"),
        # one slice of all layers' rows
        "row": normal(B, C + 16)[:, 8 : C + 8] if case.get("row") else None,
        "residual": normal(B, Y, X, C) if case.get("residual") else None,
        "beside": normal(B // case.get("parts", 1), Y, X, C2) * 2 if C2 else None,
        "shift": normal(C) if case.get("shift") else None,
        "scale_shift": normal(B, 2 * (C + C2) + 8)[:, 8:] if case.get("scaled") else None,
        "keep": case.get("keep", False),
    }


def _bytes(case: Case, size: int) -> int:
    pixels, C, C2 = case.B * case.Y * case.X, case.C, case.get("C2", 0)
    x = pixels * C * (2 if case.get("residual") else 1)
    beside = pixels // case.get("parts", 1) * C2
    channels = 2 * (C + C2) + bool(case.get("row")) * case.B * C + bool(case.get("shift")) * C
    channels += bool(case.get("scaled")) * 2 * case.B * (C + C2)
    made = 2 if case.get("residual") or case.get("keep") else 1  # with the sum
    return int(size * (x + beside + pixels * (C + C2) * made + channels))


def _flops(case: Case) -> int:
    """6 for the moments, 3 for slope and offset, 4 for SiLU, 21 for GELU; 2 for each pixel of the
    sum."""
    each = 6 + 3 + {"none": 0, "silu": 4, "gelu": 21}[case.get("act", "silu")]
    C, C2 = case.C, case.get("C2", 0)
    return int(case.B * case.Y * case.X * ((C + C2) * each + 2 * bool(case.get("residual")) * C))


CASES = (
    # the resnets and transformers of SD1.5 at 512², batch 2 (guidance)
    Case("sd15-64", B=2, Y=64, X=64, C=320, G=32, row=True),
    Case("sd15-64-cat", B=1, Y=64, X=64, C=640, C2=320, G=32, residual=True),
    Case("sd15-32-attn", B=2, Y=32, X=32, C=640, G=32, act="none", eps=1e-6),
    Case("sd15-32-cat", B=2, Y=32, X=32, C=1280, C2=640, G=32, shift=True, keep=True),
    Case("sd15-16", B=2, Y=16, X=16, C=1280, G=32, row=True, shift=True),
    Case("sd15-16-cat-shared", B=2, Y=16, X=16, C=1280, C2=640, G=32, parts=2, keep=True),
    Case("sd15-8-cat", B=2, Y=8, X=8, C=1280, C2=1280, G=32),
    Case("sdxl-64", B=1, Y=64, X=64, C=640, G=32, row=True, shift=True),
    Case("sdxl-32-residual", B=1, Y=32, X=32, C=1280, G=32, residual=True),
    Case("vae-mid", B=1, Y=64, X=64, C=512, G=32, eps=1e-6),
    Case("vae-top", B=1, Y=256, X=256, C=128, G=32, eps=1e-6),
    # DDPM at 256²: a program takes 8 or 16 channels of all pixels
    Case("ddpm-64", B=1, Y=64, X=64, C=256, G=32, row=True, shift=True),
    Case("ddpm-32-cat", B=1, Y=32, X=32, C=256, C2=256, G=32, residual=True),
    # the x4 upscaler: a program reads 16 channels of all pixels twice
    Case("x4-64", B=2, Y=64, X=64, C=512, G=32, act="none", residual=True, shift=True),
    # ADM at 64²: scale and shift from the timestep; DeepFloyd IF's GELU
    Case("adm-16-scaled", B=2, Y=16, X=16, C=576, G=32, scaled=True, shift=True),
    Case("if-8-gelu", B=2, Y=8, X=8, C=768, G=32, act="gelu", scaled=True),
    # the demo pipeline
    Case("demo-16-cat", B=2, Y=16, X=16, C=96, C2=64, G=32),
    Case("demo-vae", B=1, Y=64, X=64, C=32, G=16, eps=1e-6),
    # difficult: neither channels nor groups a power of two, odd pictures, one pixel, one group
    Case("odd", B=3, Y=9, X=5, C=84, G=12, row=True, residual=True),
    Case("prime", B=1, Y=33, X=17, C=35, G=5, act="none"),
    Case("one-pixel", B=2, Y=1, X=1, C=90, G=3, residual=True),
    Case("one-group", B=1, Y=7, X=3, C=30, G=1),
    Case("far-mean", B=2, Y=16, X=16, C=56, G=28, mean=1000.0, deviation=0.01, act="none"),
    Case("outlier", B=1, Y=32, X=32, C=64, G=8, outlier=1e4),
    Case("odd-scaled", B=3, Y=9, X=5, C=42, G=6, act="gelu", row=True, scaled=True),
    # a group across an odd border, with all optional terms
    Case("odd-cat", B=4, Y=9, X=5, C=31, C2=14, G=5, parts=2, row=True, shift=True, residual=True),
    Case("odd-kept", B=2, Y=5, X=3, C=35, G=5, shift=True, keep=True),
    Case("odd-cat-scaled", B=2, Y=47, X=31, C=31, C2=14, G=5, act="none", scaled=True, keep=True),
)

SPEC = KernelSpec(
    name="group_norm_silu",
    arguments=Arguments,
    formula=formula,
    inputs=inputs,
    cases=CASES,
    bytes=_bytes,
    flops=_flops,
)
