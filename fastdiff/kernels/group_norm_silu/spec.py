"""Contract of `group_norm_silu`: torch only."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.contract import Case, KernelSpec


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    row: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    total = x
    if row is not None:
        total = total + row[:, None, None, :]
    if residual is not None:
        total = total + residual
    y = F.group_norm(total.permute(0, 3, 1, 2), groups, weight, bias, eps)
    y = (F.silu(y) if silu else y).permute(0, 2, 3, 1).contiguous()
    return y, total.contiguous() if residual is not None else x.new_empty(0)


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    B, Y, X, C = case.B, case.Y, case.X, case.C
    x = torch.randn(B, Y, X, C, generator=generator, device=device)
    x = (x * case.get("deviation", 1.0) + case.get("mean", 0.0)).to(dtype)
    if case.get("outlier"):
        x[:, 0, 0, :] = case.outlier
    return {
        "x": x,
        "weight": normal(C) * 0.2 + 1,
        "bias": normal(C) * 0.2,
        "groups": case.G,
        "eps": case.get("eps", 1e-5),
        "silu": case.get("silu", True),
        "row": normal(B, C + 8)[:, 4 : C + 4] if case.get("row") else None,  # one of all layers
        "residual": normal(B, Y, X, C) if case.get("residual") else None,
    }


def _passes(case: Case) -> int:
    """Tensors of x's size that must cross DRAM: read x, write y; a residual is read and summed."""
    return 2 + 2 * bool(case.get("residual"))


CASES = (
    # the resnets and transformers of SD1.5 at 512², batch 2 (CFG)
    Case("sd15-64", B=2, Y=64, X=64, C=320, G=32, row=True),
    Case("sd15-64-cat", B=2, Y=64, X=64, C=960, G=32),
    Case("sd15-32-attn", B=2, Y=32, X=32, C=640, G=32, silu=False, eps=1e-6),
    Case("sd15-16", B=2, Y=16, X=16, C=1280, G=32, row=True),
    Case("sd15-8-cat", B=2, Y=8, X=8, C=2560, G=32),
    Case("sdxl-128", B=1, Y=128, X=128, C=320, G=32, row=True),
    Case("sdxl-32-residual", B=2, Y=32, X=32, C=1280, G=32, residual=True),
    Case("vae-mid", B=1, Y=64, X=64, C=512, G=32, eps=1e-6),
    Case("vae-top", B=1, Y=256, X=256, C=128, G=32, eps=1e-6),
    # the demo pipeline
    Case("demo-16-cat", B=2, Y=16, X=16, C=160, G=32, row=True),
    Case("demo-vae", B=1, Y=64, X=64, C=32, G=16, eps=1e-6),
    # nasty: neither channels nor groups a power of two, odd pictures, one pixel, one group
    Case("odd", B=3, Y=9, X=5, C=84, G=12, row=True, residual=True),
    Case("prime", B=1, Y=33, X=17, C=35, G=5, silu=False),
    Case("one-pixel", B=2, Y=1, X=1, C=96, G=3, residual=True),
    Case("one-group", B=1, Y=7, X=3, C=30, G=1),
    Case("far-mean", B=2, Y=16, X=16, C=64, G=32, mean=1000.0, deviation=0.01, silu=False),
    Case("outlier", B=1, Y=32, X=32, C=64, G=8, outlier=1e4),
)

SPEC = KernelSpec(
    name="group_norm_silu",
    schema=(
        "(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu,"
        " Tensor? row=None, Tensor? residual=None) -> (Tensor, Tensor)"
    ),
    reference=reference,
    inputs=inputs,
    cases=CASES,
    bytes=lambda c, size: size * c.B * c.Y * c.X * c.C * _passes(c),
    flops=lambda c: 12 * c.B * c.Y * c.X * c.C,
)
