"""Contract of `joint_attention`: torch only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.attention.spec import reference as attention
from fastdiff.kernels.contract import Case, KernelSpec


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    scale: float | None = None,
    attend: Callable[..., Tensor] = attention,
) -> tuple[Tensor, Tensor]:
    """By one attention, `attend`, over what is put end to end."""
    pairs = ((q, text_q), (k, text_k), (v, text_v))
    all_q, all_k, all_v = (torch.cat(pair, 1) for pair in pairs)
    out = attend(all_q, all_k, all_v, scale=scale)
    picture, text = out.split([q.shape[1], text_q.shape[1]], 1)
    # copies even where a slice is contiguous: the outputs of an op may not share memory
    return (
        picture.clone(memory_format=torch.contiguous_format),
        text.clone(memory_format=torch.contiguous_format),
    )


def fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), text_q.new_empty(text_q.shape)


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    B, L, T, H, K = case.B, case.L, case.T, case.H, case.K
    q, k, v = normal(B, L, 3, H, K).unbind(2)  # slices of one packed projection for each sequence
    text_q, text_k, text_v = normal(B, T, 3, H, K).unbind(2)
    q = q * case.get("spread", 1.0)  # > 1 makes the softmax peaky
    states = {"q": q, "k": k, "v": v, "text_q": text_q, "text_k": text_k, "text_v": text_v}
    return states | {"scale": case.get("scale")}


CASES = (
    # SD3 and SD3.5: 77 words of CLIP and 256 of T5 beside 64 x 64 (1024²) and 32 x 32 (512²) tokens
    Case("sd3-1024px", B=1, L=4096, T=333, H=1, K=64),
    Case("sd3-512px", B=2, L=1024, T=333, H=2, K=64),
    Case("sd3-clip-only", B=2, L=256, T=77, H=2, K=64),
    # nasty: one word, odd pictures, fewer keys than a block, heads that are no power of two
    Case("one-word", B=2, L=256, T=1, H=2, K=64),
    Case("odd", B=3, L=77, T=45, H=3, K=40),
    Case("small", B=2, L=9, T=5, H=2, K=64),
    Case("peaky", B=1, L=200, T=130, H=2, K=64, spread=30.0),
    Case("scaled", B=1, L=128, T=64, H=2, K=80, scale=-0.05),
)

SPEC = KernelSpec(
    name="joint_attention",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor text_q, Tensor text_k, Tensor text_v,"
        " float? scale=None) -> (Tensor, Tensor)"
    ),
    reference=reference,
    fake=fake,
    inputs=inputs,
    cases=CASES,
    bytes=lambda c, size: size * 4 * c.B * (c.L + c.T) * c.H * c.K,
    flops=lambda c: 4 * c.B * c.H * (c.L + c.T) ** 2 * c.K,
    products=True,
)
