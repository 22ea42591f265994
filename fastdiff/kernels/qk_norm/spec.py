"""Contract of `qk_norm`; imports only torch."""

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

    q: Tensor
    k: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    eps: float = 1e-06
    cos: Tensor | None = None
    sin: Tensor | None = None


def check(a: Arguments) -> None:
    """Raise ValueError for arguments that no implementation accepts."""
    if a.q.ndim != 4:
        raise ValueError(f"qk_norm: q is {list(a.q.shape)}; expected [B, L, H, K]")
    _, L, _, K = a.q.shape
    if a.k.shape != a.q.shape or a.k.dtype != a.q.dtype or a.k.device != a.q.device:
        raise ValueError(
            f"qk_norm: k is {a.k.dtype} {list(a.k.shape)} on {a.k.device}; expected"
            f" {a.q.dtype} {list(a.q.shape)} on {a.q.device}, as q is"
        )
    for name, tensor in {"q": a.q, "k": a.k}.items():
        if tensor.stride(3) != 1:
            raise ValueError(f"qk_norm: {name} has strides {tensor.stride()}; the last must be 1")
    expects("qk_norm: q_weight", a.q_weight, a.q, (K,))
    expects("qk_norm: k_weight", a.k_weight, a.q, (K,))
    if (a.cos is None) != (a.sin is None):
        raise ValueError("qk_norm: cos and sin belong together; got one of them")
    if a.cos is not None:
        if K % 2:
            raise ValueError(f"qk_norm: a rotary embedding needs pairs; heads are {K} wide")
        like = a.cos.new_empty(0, dtype=torch.float32, device=a.q.device)
        for name, angles in {"cos": a.cos, "sin": a.sin}.items():
            expects(f"qk_norm: {name}", angles, like, (L, K))
            if angles is not None and not angles.is_contiguous():
                raise ValueError(f"qk_norm: {name} has strides {angles.stride()}; not contiguous")


def formula(a: Arguments) -> tuple[Tensor, Tensor]:
    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        y = F.rms_norm(x, x.shape[-1:], weight, a.eps)
        if a.cos is not None and a.sin is not None:
            even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((-odd, even), -1).flatten(-2)
            y = (y * a.cos[:, None, :] + turned * a.sin[:, None, :]).to(x.dtype)
        return y.contiguous()

    return one(a.q, a.q_weight), one(a.k, a.k_weight)


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    B, L, H, K = case.B, case.L, case.H, case.K
    q, k, _ = (normal(B, L, 3, H, K) * case.get("deviation", 1.0)).to(dtype).unbind(2)
    weights = (normal(2, K) * 0.2 + 1).to(dtype).unbind(0) if case.get("affine") else (None, None)
    cos = sin = None
    if case.get("rotary"):
        angle = normal(L, K // 2).repeat_interleave(2, 1) * 3  # equal for both elements of a pair
        cos, sin = angle.cos(), angle.sin()
    return {
        "q": q,
        "k": k,
        "q_weight": weights[0],
        "k_weight": weights[1],
        "eps": case.get("eps", 1e-6),
        "cos": cos,
        "sin": sin,
    }


def _bytes(case: Case, size: int) -> int:
    """q and k, read and written; both weights; the float32 tables of cosines and sines."""
    affine, tables = 2 * bool(case.get("affine")), 2 * bool(case.get("rotary"))
    elements = 4 * case.B * case.L * case.H * case.K + affine * case.K
    return int(size * elements + 4 * tables * case.L * case.K)


def _flops(case: Case) -> int:
    """A square and its sum, times 1 / rms, times the weight; two products and a sum to rotate."""
    each = 3 + bool(case.get("affine")) + 3 * bool(case.get("rotary"))
    return int(each * 2 * case.B * case.L * case.H * case.K)


CASES = (
    Case("sd35-large-text", B=2, L=333, H=38, K=64, affine=True),
    Case("sd35-medium-text", B=2, L=78, H=24, K=64, affine=True),
    Case("flux-512", B=1, L=1024, H=24, K=128, affine=True, rotary=True),
    # difficult: odd numbers of heads and tokens, widths that are not powers of two, tiny values
    Case("narrow-rotary", B=2, L=7, H=3, K=6, rotary=True, affine=True),
    Case("wide-rotary", B=2, L=19, H=5, K=72, rotary=True),
    Case("odd", B=3, L=5, H=3, K=37, affine=True),
    Case("tiny-values", B=1, L=17, H=2, K=64, affine=True, deviation=1e-3),
)

SPEC = KernelSpec(
    name="qk_norm",
    arguments=Arguments,
    formula=formula,
    inputs=inputs,
    cases=CASES,
    bytes=_bytes,
    flops=_flops,
)
