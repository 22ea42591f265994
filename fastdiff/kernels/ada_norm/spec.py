"""Contract of `ada_norm`; imports only torch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.contract import Case, KernelSpec
from fastdiff.kernels.dispatch import expects


@dataclass(slots=True)
class Arguments:
    """The op's arguments; see its public function."""

    x: Tensor
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    gate: Tensor | None = None
    residual: Tensor | None = None
    rms: bool = False
    limit: float = 0.0
    later: Tensor | None = None


def check(a: Arguments) -> None:
    """Raise ValueError for arguments that no implementation accepts."""
    if a.x.ndim != 3:
        raise ValueError(f"ada_norm: x is {list(a.x.shape)}; expected [B, L, D]")
    B, L, D = a.x.shape
    expects("ada_norm: weight", a.weight, a.x, (D,))
    expects("ada_norm: bias", a.bias, a.x, (D,))
    expects("ada_norm: scale", a.scale, a.x, (B, D))
    expects("ada_norm: shift", a.shift, a.x, (B, D))
    expects("ada_norm: gate", a.gate, a.x, (B, D))
    if a.residual is not None:
        samples = a.residual.shape[0] if a.residual.shape[0] and B % a.residual.shape[0] == 0 else B
        expects("ada_norm: residual", a.residual, a.x, (samples, L, D))
    for name in ("gate", "later"):
        if a.residual is None and getattr(a, name) is not None:
            raise ValueError(f"ada_norm: {name} needs a residual, but there is none")
    expects("ada_norm: later", a.later, a.x, (D,))
    if a.rms and a.bias is not None:
        raise ValueError("ada_norm: RMSNorm has no bias")


def summed(x: Tensor, gate: Tensor | None, residual: Tensor | None) -> Tensor:
    """residual + gate * x, with the residual repeated; x itself without a residual."""
    if residual is None:
        return x
    gated = x if gate is None else gate[:, None, :] * x
    return residual.repeat(x.shape[0] // max(1, residual.shape[0]), 1, 1) + gated


def formula(a: Arguments) -> tuple[Tensor, Tensor]:
    total = summed(a.x, a.gate, a.residual)
    if a.limit and a.residual is not None:
        total = total.clamp(-a.limit, a.limit)
    width = total.shape[-1:]
    y = (
        F.rms_norm(total, width, a.weight, a.eps)
        if a.rms
        else F.layer_norm(total, width, a.weight, a.bias, a.eps)
    )
    if a.scale is not None:
        y = y * (1 + a.scale[:, None, :])
    if a.shift is not None:
        y = y + a.shift[:, None, :]
    if a.residual is None:
        return y.contiguous(), a.x.new_empty(0)
    return y.contiguous(), (total if a.later is None else total + a.later).contiguous()


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    B, L, D = case.B, case.L, case.D
    x = normal(B, L, D) * case.get("deviation", 1.0) + case.get("mean", 0.0)
    affine, rms = case.get("affine", False), case.get("rms", False)
    modulation = (normal(B, 6 * D) * 0.3).to(dtype)  # six rows per sample from one projection
    shift, scale, gate = modulation.chunk(6, dim=1)[:3]
    modulated, samples = case.get("modulated", False), case.get("residual", 0)
    return {
        "x": x.to(dtype),
        "eps": case.get("eps", 1e-5),
        "weight": (normal(D) * 0.2 + 1).to(dtype) if affine else None,
        "bias": (normal(D) * 0.2).to(dtype) if affine and not rms else None,
        "scale": scale if modulated else None,
        "shift": shift if modulated else None,
        "gate": gate if case.get("gated") else None,
        "residual": normal(samples, L, D).to(dtype) if samples else None,
        "rms": rms,
        "limit": case.get("limit", 0.0),
        "later": normal(D).to(dtype) if case.get("later") else None,
    }


def _parameters(case: Case) -> int:
    """Elements of weight, bias, scale, shift, gate and later."""
    affine = case.get("affine", False) * (1 if case.get("rms") else 2)
    rows = 2 * bool(case.get("modulated")) + bool(case.get("gated"))
    return int((affine + case.B * rows + bool(case.get("later"))) * case.D)


def _bytes(case: Case, size: int) -> int:
    samples = case.get("residual", 0)
    tensors = 2 * case.B + (case.B + samples if samples else 0)  # x, y; the sum, the residual
    return int(size * (tensors * case.L * case.D + _parameters(case)))


def _flops(case: Case) -> int:
    """LayerNorm: subtract the mean, then its rounding error, multiply by 1 / std; two sums and one
    sum of squares. RMSNorm: one sum of squares and a product. Then the optional terms, 1 + scale
    counted, too."""
    each = 3 if case.get("rms") else 7
    each += case.get("affine", False) * (1 if case.get("rms") else 2)
    each += 3 * bool(case.get("modulated"))
    each += sum(bool(case.get(term)) for term in ("gated", "residual", "later"))
    return int(each * case.B * case.L * case.D)


CASES = (
    # the transformers of U-Nets, batch 2 (guidance): LayerNorm with weight and bias
    Case("demo", B=2, L=256, D=64, affine=True),
    Case("sd15-64", B=2, L=4096, D=320, affine=True),
    Case("sd15-32-residual", B=2, L=1024, D=640, affine=True, residual=2, later=True),
    Case("sdxl-32", B=2, L=1024, D=1280, affine=True),
    # SD3-medium (1536), SD3.5-large (2432) and FLUX (3072): a block's first norm, the norm after
    # attention, and with 78 tokens a text without T5
    Case("sd3-text-first", B=2, L=333, D=1536, eps=1e-6, modulated=True),
    Case("sd3-512", B=2, L=1024, D=1536, eps=1e-6, modulated=True, gated=True, residual=2),
    Case("sd35-text-first", B=2, L=78, D=2432, eps=1e-6, modulated=True),
    Case("sd35-text", B=2, L=333, D=2432, eps=1e-6, modulated=True, gated=True, residual=2),
    Case("flux-part", B=1, L=16, D=3072, eps=1e-6, modulated=True, gated=True, residual=1),
    # difficult: halves that share a residual, odd and narrow rows, means far beyond the deviation
    Case("shared", B=4, L=80, D=640, affine=True, residual=2),
    Case("odd", B=3, L=77, D=1001, affine=True),
    Case("odd-everything", B=3, L=7, D=1001, affine=True, modulated=True, gated=True, residual=1),
    Case("odd-later", B=2, L=9, D=77, affine=True, residual=2, later=True),
    Case("narrow", B=1, L=5, D=3, affine=True),
    Case("one-token", B=3, L=1, D=70, modulated=True, gated=True, residual=3),
    Case("rms", B=2, L=77, D=1536, eps=1e-6, rms=True, affine=True),
    Case("rms-modulated", B=2, L=19, D=96, eps=1e-6, rms=True, modulated=True, residual=2),
    Case("limited", B=2, L=9, D=40, modulated=True, gated=True, residual=2, limit=0.5),
    Case("far-mean", B=1, L=64, D=96, affine=True, mean=1000.0, deviation=0.01),
)

SPEC = KernelSpec(
    name="ada_norm",
    arguments=Arguments,
    formula=formula,
    inputs=inputs,
    cases=CASES,
    bytes=_bytes,
    flops=_flops,
)
