"""RMSNorm of each head of queries and keys, with their rotary embedding, in one launch."""

from torch import Tensor

from fastdiff.kernels.dispatch import register
from fastdiff.kernels.qk_norm import cpu
from fastdiff.kernels.qk_norm.spec import SPEC

_op = register(SPEC, cpu=cpu.run, gpu="fastdiff.kernels.qk_norm.gpu")


def qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """n = x / sqrt(mean(x²) + eps) · weight for each head of q and of k, then its pairs are
    rotated.

    For each pair (n[2i], n[2i + 1]) of a head at token l:

        y[2i]     = n[2i] · cos[l, 2i]         - n[2i + 1] · sin[l, 2i]
        y[2i + 1] = n[2i + 1] · cos[l, 2i + 1] + n[2i] · sin[l, 2i + 1]

    This is diffusers' `apply_rotary_emb` with `use_real_unbind_dim=-1` (Flux). Everything is
    computed in float32 and rounded once.

    Args:
        q, k: [B, L, H, K], float32, bfloat16 or float16, any strides whose last is 1 (slices of
            one packed projection).
        q_weight, k_weight: [K] of the same dtype; None: 1.
        eps: added to the mean square.
        cos, sin: [L, K] float32, contiguous, both or none; K must then be even.

    Returns:
        q and k normalised (and rotated), each contiguous.

    Raises:
        ValueError: shapes, dtypes, devices or strides other than these; only one of cos and sin.

    Zhang & Sennrich, Root Mean Square Layer Normalization (2019); Henry et al., Query-Key
    Normalization for Transformers (2020); Su et al., RoFormer (2021).
    """
    turned_q, turned_k = _op(q, k, q_weight, k_weight, eps, cos, sin)
    return turned_q, turned_k
