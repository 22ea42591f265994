"""softmax(q kᵀ) v for self- and cross-attention, and the table that chooses its implementation."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff.kernels.attention import cpu, products
from fastdiff.kernels.attention.spec import SPEC
from fastdiff.kernels.dispatch import implementation, register
from fastdiff.kernels.where import on_gpu

_op = register(SPEC, cpu=cpu.run, gpu="fastdiff.kernels.attention.gpu", otherwise=cpu.plain)


@dataclass(frozen=True)
class Choice:
    """A row of the table. It applies if all its bounds hold; the first row that applies decides."""

    why: str
    run: str
    widths: tuple[int, ...] = ()
    max_keys: int | None = None
    over: int = 0
    """The row applies to heads wider than this."""
    multiple: int = 1
    """The row applies to heads whose width is a multiple of this."""
    half: bool = False
    """The row applies to half precision only."""


CUDA_CHOICES = (
    Choice(
        "wide heads of few keys: one launch, whose programs share a head's columns, for three",
        "triton",
        max_keys=256,
        over=256,
        multiple=64,
        half=True,
    ),
    Choice(
        "autoencoders: cuDNN and FlashAttention stop at 256, where torch uses kernels of 2022;"
        " ours (up to 512) keeps few warps busy; cuBLAS does products at full rate",
        "products",
        over=256,
    ),
    Choice("text: K and V stay on chip; SDPA tiles pad 77 keys to 128", "triton", max_keys=320),
    Choice(
        "SDPA pads 40 to 64, 80 to 96 or 128, 160 to 192 or 256", "triton", widths=(40, 80, 160)
    ),
    Choice("powers of two: cuDNN's and FlashAttention's home ground, until measured", "sdpa"),
)
"""The implementation on an NVIDIA GPU. The reasons are published facts; no row is measured yet."""


def choose(width: int, keys: int, size: int) -> Choice:
    """The first row of `CUDA_CHOICES` that applies to heads `width` wide, `keys` keys and elements
    of `size` bytes."""
    return next(
        choice
        for choice in CUDA_CHOICES
        if width > choice.over
        and (not choice.widths or width in choice.widths)
        and (choice.max_keys is None or keys <= choice.max_keys)
        and width % choice.multiple == 0
        and (size == 2 or not choice.half)
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v for each head; scores and softmax in float32.

    Args:
        q: [B, Lq, H, K]; k, v: [B, Lk, H, K]; any strides whose last is 1 (slices of one packed
            projection need no copy).
        mask: additive, broadcastable to [B, H, Lq, Lk], in q's dtype.
        scale: default 1 / sqrt(K).
        impl: "auto" (the CPU kernel, or the choice of `CUDA_CHOICES`), "cpu", "triton", "products",
            "sdpa" or "reference". If you name an implementation, it runs or raises.

    Returns:
        [B, Lq, H, K], contiguous, in q's dtype.

    Raises:
        ValueError: shapes that do not fit together, or an unknown `impl`.

    Dao et al., FlashAttention (2022).
    """
    if k.shape != v.shape or q.shape[2:] != k.shape[2:] or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; expected"
            " q [B, Lq, H, K], k and v [B, Lk, H, K]"
        )
    if impl == "auto" and on_gpu(q):
        impl = choose(q.shape[3], k.shape[1], q.element_size()).run
    if impl == "products":
        return products.run(q, k, v, mask, scale)
    if impl == "sdpa":
        return _sdpa(q, k, v, mask, scale)
    if impl == "auto" or (impl == "triton" and on_gpu(q)):
        out: Tensor = _op(q, k, v, mask, scale)
        return out
    named: Tensor = implementation("attention", impl)(q, k, v, mask, scale)
    return named


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(order, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return out.transpose(1, 2).contiguous()
