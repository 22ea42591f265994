"""softmax(q kᵀ) v for a picture and a text that attend to each other and to themselves."""

import torch
from torch import Tensor

from fastdiff.kernels.dispatch import expects, register
from fastdiff.kernels.joint_attention import cpu
from fastdiff.kernels.joint_attention.spec import SPEC

_op = register(SPEC, cpu=cpu.run, gpu="fastdiff.kernels.joint_attention.gpu", otherwise=cpu.plain)


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor | None,
    text_k: Tensor,
    text_v: Tensor,
    scale: float | None = None,
    text_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · [q; text_q] [k; text_k]ᵀ + [0; text_bias]) [v; text_v] for each head, in one
    launch.

    The same as `attention` of the concatenated sequences, but without the concatenation: a GPU
    reads both sequences in place and writes both results. Scores and softmax are in float32.

    Args:
        q, k, v: [B, L, H, K], the picture's; any strides whose last is 1 (slices of one packed
            projection need no copy); float32, bfloat16 or float16.
        text_q, text_k, text_v: [B, T, H, K], the text's, in q's dtype; strides as for q.
            Without text_q no result is computed for the text, but the picture attends to it.
        scale: default 1 / sqrt(K).
        text_bias: [T], or [B, T] for each sample; float32, contiguous; added to the scores of the
            text's keys. One token with log n replaces n equal tokens; -10000 hides a token.

    Returns:
        [B, L, H, K] and [B, T, H, K], or [0] without text_q; contiguous, in q's dtype.

    Raises:
        ValueError: shapes that do not fit together, an empty sequence, or an invalid text_bias.

    Esser et al., Scaling Rectified Flow Transformers (2024), figure 2b; Dao et al., FlashAttention
    (2022).
    """
    B, L, H, K = q.shape
    T = text_k.shape[1]
    text = [t for t in (text_q, text_k, text_v) if t is not None]
    if any(t.shape != q.shape for t in (k, v)) or any(t.shape != (B, T, H, K) for t in text):
        shapes = [list(t.shape) for t in (q, k, v, *text)]
        raise ValueError(
            f"joint_attention: {shapes}; expected [B, L, H, K] for q, k and v, and [B, T, H, K] for"
            " text_q, text_k and text_v"
        )
    if text_bias is not None:
        if text_bias.dtype != torch.float32 or text_bias.device != q.device:
            raise ValueError(
                f"joint_attention: text_bias is {text_bias.dtype} on {text_bias.device}; expected"
                f" torch.float32 on {q.device}"
            )
        shape = (T,) if text_bias.ndim == 1 else (B, T)
        expects("joint_attention: text_bias", text_bias, text_bias, shape)
    if L == 0 or T == 0:
        raise ValueError(f"joint_attention: {L} picture and {T} text tokens; expected both")
    out, text_out = _op(q, k, v, text_q, text_k, text_v, scale, text_bias)
    return out, text_out
