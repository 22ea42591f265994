"""Contract of `softmax`; imports only torch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.contract import Case, KernelSpec


@dataclass(slots=True)
class Arguments:
    """The op's arguments; see its public function."""

    scores: Tensor
    like: Tensor
    scale: float = 1.0


def formula(a: Arguments) -> Tensor:
    return (a.scores * a.scale).softmax(-1).to(a.like.dtype, copy=True)


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    scores = torch.randn(case.B, case.L, case.K, generator=generator, device=device)
    scores = scores * case.get("spread", 1.0) + case.get("mean", 0.0)
    if case.get("hidden"):  # a mask's
        scores[..., 1::2] = float("-inf")
    return {
        "scores": scores,
        "like": torch.empty(1, dtype=dtype, device=device),
        "scale": case.get("scale", 1.0),
    }


CASES = (
    # self-attention whose heads are 512 wide: DDPM's at 256², autoencoders' at 512² and 1024², of
    # which a few of the rows; more rows are more programs of the same launch
    Case("ddpm-16", B=1, L=256, K=256, scale=512**-0.5),
    Case("vae-64-part", B=1, L=16, K=4096, scale=512**-0.5),
    Case("vae-128-part", B=1, L=4, K=16384, scale=512**-0.5),
    # difficult: rows that do not fit on chip, odd ones, far from zero, one key, hidden keys
    Case("long", B=1, L=3, K=70001),
    Case("odd", B=2, L=7, K=77, spread=8.0),
    Case("far", B=1, L=9, K=130, mean=1e4, spread=100.0, scale=0.1),
    Case("one", B=3, L=1, K=1),
    Case("hidden", B=1, L=5, K=40, hidden=True),
)

SPEC = KernelSpec(
    name="softmax",
    arguments=Arguments,
    formula=formula,
    inputs=inputs,
    cases=CASES,
    bytes=lambda c, size: (4 + size) * c.B * c.L * c.K,
    flops=lambda c: c.B * c.L * (5 * c.K - 1),
)
