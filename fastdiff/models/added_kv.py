"""Attention of a picture to a text and to its own pixels at once, on borrowed weights: unCLIP's
decoder, Kandinsky, DeepFloyd IF."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastdiff.kernels.attention import attention
from fastdiff.kernels.joint_attention import joint_attention
from fastdiff.kernels.linear import linear
from fastdiff.models.blocks import open_attention, repeated, split_heads
from fastdiff.models.borrow import Loan, Norm, Weights
from fastdiff.models.sums import Sum, projected
from fastdiff.models.transformer import CrossColumns

PROCESSORS = ("AttnAddedKVProcessor", "AttnAddedKVProcessor2_0")


@dataclass(frozen=True)
class AddedKV:
    """One attention over [text; picture] after a GroupNorm, with a residual."""

    heads: int
    norm: Norm
    q: Weights
    """Queries; with keys and values below them unless the picture attends only to the text."""
    text: slice
    """This attention's columns (K, then V) in the projected text of all attentions."""
    own: bool
    """Whether the picture attends to its own pixels, too."""
    out: Weights

    def __call__(
        self, x: Sum, text: Tensor | None, images: object, mask: Tensor | None, *_more: object
    ) -> Sum:
        """x [B, Y, X, C], text [B or 2B, T, …] -> [B or 2B, Y, X, C].

        mask: [B or 2B, T] float32, added to the scores of the text's keys; only if `own`.
        """
        assert text is not None
        h = x.group_normed(self.norm, "none").flatten(1, 2)
        h = linear(h, self.q.weight, self.q.bias)
        h = h.expand(len(text), -1, -1) if len(h) == 1 else repeated(h, len(text))
        k, v = split_heads(text[..., self.text], 2, self.heads)
        if self.own:
            q, own_k, own_v = split_heads(h, 3, self.heads)
            seen, _ = joint_attention(q, own_k, own_v, None, k, v, text_bias=mask)
        else:
            (q,) = split_heads(h, 1, self.heads)
            seen = attention(q, k, v)
        around = x.closed()
        return projected(seen.reshape(len(text), *around.shape[1:3], -1), self.out, around)


def borrow_added_kv(module: Any, loan: Loan, text: CrossColumns) -> AddedKV:
    """From an Attention with a separate projection for the text (`added_kv_proj_dim`)."""
    attention, out = open_attention(
        module, loan, residual=False, processors=PROCESSORS, text_norm=True
    )
    only = bool(attention.only_cross_attention)
    own = () if only else (attention.to_k, attention.to_v)
    return AddedKV(
        heads=attention.heads,
        norm=loan.norm(attention.group_norm),
        q=loan.linear(attention.to_q, *own),
        text=text.take_added(attention, loan),
        own=not only,
        out=loan.linear(out),
    )
