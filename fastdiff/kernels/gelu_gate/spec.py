"""Contract of `gelu_gate`; imports only torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.contract import Case, KernelSpec


@dataclass(slots=True)
class Arguments:
    """The op's arguments; see its public function."""

    h: Tensor
    bias: Tensor | None = None
    act: str = "gelu"


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    **{"gelu": F.gelu, "silu": F.silu, "silu_first": F.silu}
}
"""The gate's activations."""


def halves(a: Arguments) -> tuple[Tensor, Tensor]:
    """Value and gate."""
    first, second = (a.h if a.bias is None else a.h + a.bias).chunk(2, dim=-1)
    return (second, first) if a.act == "silu_first" else (first, second)


def formula(a: Arguments) -> Tensor:
    value, gate = halves(a)
    return (value * ACTIVATIONS[a.act](gate)).contiguous()


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    width = 2 * case.N + case.get("beside", 0)  # the first columns of a wider projection
    h = (normal(case.B, case.L, width) * case.get("spread", 1.0)).to(dtype)
    return {
        "h": h[..., : 2 * case.N],
        "bias": normal(2 * case.N).to(dtype) if case.get("bias") else None,
        "act": case.get("act", "gelu"),
    }


CASES = (
    # the widths of SD1.5 at 512² and of SDXL at 1024², batch 2 (guidance), with some of the 2 x
    # 1024
    # or more rows: more rows are more programs of the same launch
    Case("sd15-32-part", B=2, L=128, N=2560),
    Case("sdxl-32-part", B=2, L=64, N=5120, bias=True),
    Case("demo-16", B=2, L=256, N=256, spread=3.0),
    Case("auraflow-part", B=2, L=16, N=8192, act="silu"),
    # FLUX.2's single-stream blocks, beside queries, keys and values
    Case("flux2-part", B=1, L=16, N=18432, beside=18432, act="silu_first"),
    # difficult
    Case("wide-gates", B=1, L=64, N=256, spread=20.0),
    Case("small-gates", B=1, L=64, N=256, spread=1e-3),
    Case("columns", B=2, L=9, N=40, beside=16, bias=True),
    Case("odd", B=3, L=7, N=41, bias=True),
    Case("odd-silu", B=3, L=7, N=41, act="silu", spread=20.0),
    Case("odd-silu-first", B=2, L=3, N=21, act="silu_first", beside=10, bias=True),
    Case("one", B=1, L=1, N=1),
)

_EACH = {"gelu": 22, "silu": 10, "silu_first": 10}
"""FLOPs of an output."""
SPEC = KernelSpec(
    name="gelu_gate",
    arguments=Arguments,
    formula=formula,
    inputs=inputs,
    cases=CASES,
    bytes=lambda c, size: size * (3 * c.B * c.L * c.N + 2 * c.N * bool(c.get("bias"))),
    flops=lambda c: (_EACH[c.get("act", "gelu")] + 2 * bool(c.get("bias"))) * c.B * c.L * c.N,
)
