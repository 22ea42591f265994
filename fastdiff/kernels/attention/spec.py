"""Contract of `attention`; imports only torch."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.contract import Case, KernelSpec


@dataclass(slots=True)
class Arguments:
    """The op's arguments; see its public function."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    scale: float | None = None


def work(a: Arguments) -> tuple[str, tuple[int, ...]]:
    B, queries, H, K = a.q.shape
    return "" if a.mask is None else "masked", (B * H, queries, a.k.shape[1], K)


def formula(a: Arguments) -> Tensor:
    scale = 1.0 / math.sqrt(a.q.shape[-1]) if a.scale is None else a.scale
    q, k, v = (t.transpose(1, 2) for t in (a.q, a.k, a.v))
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    if a.mask is not None:
        scores = scores + a.mask
    return torch.matmul(scores.softmax(dim=-1).to(v.dtype), v).transpose(1, 2).contiguous()


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    B, Lq, Lk, H, K = case.B, case.Lq, case.Lk, case.H, case.K
    spread = case.get("spread", 1.0)  # > 1 makes the softmax peaky
    if Lq == Lk and not case.get("separate"):  # self-attention: slices of one packed projection
        q, k, v = normal(B, Lq, 3, H, K).unbind(2)
        q = q * spread if spread != 1.0 else q
    else:  # cross-attention: K and V are columns of a buffer with those of every layer
        q = normal(B, Lq, H, K) * spread
        packed = normal(B, Lk, 2, H * K + 16)[..., : H * K]
        k, v = (t.unflatten(-1, (H, K)) for t in packed.unbind(2))
    mask = None
    if case.get("mask"):
        keep = torch.rand(B, 1, 1, Lk, generator=generator, device=device) > 0.3
        keep[..., 0] = True
        mask = torch.where(keep, 0.0, -10000.0).to(dtype)
    return {"q": q, "k": k, "v": v, "mask": mask, "scale": case.get("scale")}


def _bytes(case: Case, size: int) -> int:
    """q, k, v and the result; a case's mask is one row per sample."""
    states: int = 2 * (case.Lq + case.Lk) * case.H * case.K
    mask: int = case.Lk if case.get("mask") else 0
    return size * int(case.B) * (states + mask)


CASES = (
    # self-attention of SD1.5 (heads 40, 80, 160 wide), SD2.1 and SDXL (64); the VAE's single head
    Case("sd15-64-self", B=1, Lq=1024, Lk=1024, H=2, K=40),
    Case("sd15-32-self", B=2, Lq=1024, Lk=1024, H=1, K=80),
    Case("sd15-16-self", B=2, Lq=256, Lk=256, H=8, K=160),
    Case("sd15-8-self", B=2, Lq=64, Lk=64, H=8, K=160),
    Case("sdxl-64-self", B=1, Lq=4096, Lk=4096, H=1, K=64),
    Case("wide-96", B=1, Lq=577, Lk=577, H=2, K=96),
    Case("wide-128", B=1, Lq=333, Lk=333, H=2, K=128),
    Case("flux-part", B=1, Lq=384, Lk=384, H=1, K=128),
    Case("vae-mid", B=1, Lq=320, Lk=320, H=1, K=512),
    # DDPM's at 256²: programs that share a head's columns compute its scores several times
    Case("ddpm-16", B=1, Lq=256, Lk=256, H=1, K=512, repeats=True),
    Case("wide-masked", B=2, Lq=70, Lk=45, H=2, K=320, mask=True, repeats=True),
    # cross-attention: text of 77 to 308 tokens
    Case("sd15-64-cross", B=2, Lq=1024, Lk=77, H=2, K=40),
    Case("sd15-16-cross", B=2, Lq=256, Lk=77, H=4, K=160),
    Case("sdxl-32-cross", B=2, Lq=1024, Lk=77, H=4, K=64),
    Case("long-prompt", B=1, Lq=256, Lk=308, H=2, K=64),
    Case("two-chunks-masked", B=2, Lq=100, Lk=154, H=2, K=80, mask=True),
    # the demo pipeline
    Case("demo-self", B=2, Lq=256, Lk=256, H=2, K=32),
    Case("demo-cross", B=2, Lq=256, Lk=24, H=2, K=32),
    # difficult
    Case("odd", B=3, Lq=45, Lk=77, H=5, K=40, mask=True),
    Case("odd-self", B=1, Lq=561, Lk=561, H=1, K=80),
    Case("one-key", B=2, Lq=17, Lk=1, H=3, K=64),
    Case("one-query", B=2, Lq=1, Lk=130, H=2, K=96, separate=True),
    Case("peaky", B=1, Lq=128, Lk=200, H=2, K=64, spread=30.0),
    Case("scaled", B=1, Lq=64, Lk=64, H=2, K=40, scale=0.05),
)

SPEC = KernelSpec(
    name="attention",
    arguments=Arguments,
    formula=formula,
    inputs=inputs,
    work=work,
    cases=CASES,
    bytes=_bytes,
    flops=lambda c: 4 * c.B * c.H * c.Lq * c.Lk * c.K,
    products=True,
)
