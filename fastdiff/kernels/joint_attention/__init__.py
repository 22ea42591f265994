"""softmax(q kᵀ) v of a picture and a text that attend to each other and to themselves."""

from torch import Tensor

from fastdiff.kernels.dispatch import register
from fastdiff.kernels.joint_attention import cpu
from fastdiff.kernels.joint_attention.spec import SPEC

_op = register(SPEC, cpu=cpu.run, gpu="fastdiff.kernels.joint_attention.gpu", otherwise=cpu.plain)


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · [q; text_q] [k; text_k]ᵀ) [v; text_v], each head by itself, in one launch.

    The same as `attention` of the sequences put end to end, but nothing is: a GPU reads both where
    they lie and writes both results. Scores and softmax are in float32.

    Args:
        q, k, v: [B, L, H, K], of the picture; any strides whose last is 1 (slices of one packed
            projection need no copy); float32, bfloat16 or float16.
        text_q, text_k, text_v: [B, T, H, K], of the text, in q's dtype; the same of their strides.
        scale: default 1 / sqrt(K).

    Returns:
        [B, L, H, K] and [B, T, H, K], contiguous, in q's dtype.

    Raises:
        ValueError: shapes that do not fit together, or an empty sequence.

    Esser et al., Scaling Rectified Flow Transformers (2024), figure 2b; Dao et al., FlashAttention
    (2022).
    """
    B, L, H, K = q.shape
    T = text_q.shape[1]
    picture, text = (k.shape, v.shape), (text_q.shape, text_k.shape, text_v.shape)
    if any(s != (B, L, H, K) for s in picture) or any(s != (B, T, H, K) for s in text):
        shapes = [list(t.shape) for t in (q, k, v, text_q, text_k, text_v)]
        raise ValueError(
            f"joint_attention: {shapes}; expected three times [B, L, H, K] and three times"
            " [B, T, H, K]"
        )
    if L == 0 or T == 0:
        raise ValueError(f"joint_attention: {L} picture and {T} text tokens; expected some of both")
    out, text_out = _op(q, k, v, text_q, text_k, text_v, scale)
    return out, text_out
