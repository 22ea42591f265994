"""Contract of `joint_attention`; imports only torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.attention import spec as attention
from fastdiff.kernels.contract import Case, KernelSpec


@dataclass(slots=True)
class Arguments:
    """The op's arguments; see its public function."""

    q: Tensor
    k: Tensor
    v: Tensor
    text_q: Tensor | None
    text_k: Tensor
    text_v: Tensor
    scale: float | None = None
    text_bias: Tensor | None = None


def work(a: Arguments) -> tuple[str, tuple[int, ...]]:
    B, L, H, K = a.q.shape
    return "" if a.text_q is not None else "silent", (B * H, L, a.text_k.shape[1], K)


def formula(
    a: Arguments, attend: Callable[[attention.Arguments], Tensor] = attention.formula
) -> tuple[Tensor, Tensor]:
    """One attention, `attend`, over the concatenated sequences."""
    all_k, all_v = torch.cat((a.k, a.text_k), 1), torch.cat((a.v, a.text_v), 1)
    mask = None
    if a.text_bias is not None:
        mask = F.pad(a.text_bias, (a.q.shape[1], 0))  # [L + T], or for each sample
        mask = mask[None] if mask.ndim == 1 else mask[:, None, None]
    if a.text_q is None:
        asked = attention.Arguments(a.q, all_k, all_v, mask, a.scale)
        return attend(asked), a.q.new_empty(0)
    all_q = torch.cat((a.q, a.text_q), 1)
    out = attend(attention.Arguments(all_q, all_k, all_v, mask, a.scale))
    picture, text = out.split([a.q.shape[1], a.text_q.shape[1]], 1)
    # copies even if a slice is contiguous: the outputs of an op may not share memory
    return (
        picture.clone(memory_format=torch.contiguous_format),
        text.clone(memory_format=torch.contiguous_format),
    )


def fake(a: Arguments) -> tuple[Tensor, Tensor]:
    return a.q.new_empty(a.q.shape), a.q.new_empty(0 if a.text_q is None else a.text_q.shape)


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    B, L, T, H, K = case.B, case.L, case.T, case.H, case.K
    q, k, v = normal(B, L, 3, H, K).unbind(2)  # slices of one packed projection for each sequence
    words = normal(B, T, 3, H, K)
    q = q * case.get("spread", 1.0)  # > 1 makes the softmax peaky
    bias = torch.zeros(T, device=device)
    bias[-1] = math.log(256)  # SD3's 256 empty tokens of T5 as one
    if case.get("masked"):  # UnCLIP's decoder hides the tokens that pad a text, up to all of it
        shown = torch.arange(B, device=device)[:, None] * T // B
        bias = torch.where(torch.arange(T, device=device) < shown, 0.0, -10000.0)
    return {
        "q": q,
        "k": k,
        "v": v,
        "text_q": None if case.get("silent") else words[:, :, 0],
        "text_k": words[:, :, 1],
        "text_v": words[:, :, 2],
        "scale": case.get("scale"),
        "text_bias": bias if case.get("biased") or case.get("masked") else None,
    }


def _bytes(case: Case, size: int) -> int:
    """q, k, v and the result of each sequence; of a text without result only k and v; the bias."""
    states = 4 * case.L + (2 if case.get("silent") else 4) * case.T
    bias = 4 * case.T * (case.B if case.get("masked") else bool(case.get("biased")))
    return int(size * case.B * case.H * case.K * states + bias)


def _flops(case: Case) -> int:
    queries = case.L + (0 if case.get("silent") else case.T)
    return int(4 * case.B * case.H * case.K * queries * (case.L + case.T))


CASES = (
    # SD3 and SD3.5: 77 tokens of CLIP and 256 of T5 with 64 x 64 (1024²) and 32 x 32 (512²)
    # patches, and some of the 24 or 38 heads, since more heads are more programs of the same launch
    Case("sd3-1024px", B=1, L=4096, T=333, H=1, K=64),
    Case("sd3-512px", B=2, L=1024, T=333, H=2, K=64),
    Case("flux-part", B=1, L=128, T=128, H=1, K=128),
    Case("sd3-clip-only", B=2, L=256, T=77, H=2, K=64),
    # without T5 its 256 tokens are one; the last block needs no result for the text
    Case("sd3-without-t5", B=2, L=256, T=78, H=2, K=64, biased=True),
    Case("sd3-last", B=2, L=256, T=333, H=2, K=64, silent=True),
    # UnCLIP's decoder: 77 tokens and 4 of the picture's embedding, masked
    Case("unclip-16", B=2, L=256, T=81, H=2, K=64, silent=True, masked=True),
    # difficult: one text token, odd pictures, fewer keys than a block, widths not powers of two
    Case("one-word", B=2, L=256, T=1, H=2, K=64),
    Case("odd", B=3, L=77, T=45, H=3, K=40),
    Case("small", B=2, L=9, T=5, H=2, K=64),
    Case("odd-silent", B=3, L=77, T=45, H=3, K=40, silent=True, biased=True),
    Case("peaky", B=1, L=200, T=130, H=2, K=64, spread=30.0),
    Case("scaled", B=1, L=128, T=64, H=2, K=80, scale=-0.05),
)

SPEC = KernelSpec(
    name="joint_attention",
    arguments=Arguments,
    formula=formula,
    fake=fake,
    inputs=inputs,
    work=work,
    cases=CASES,
    bytes=_bytes,
    flops=_flops,
    products=True,
)
