"""The attention of SD3's MM-DiT, on borrowed weights: picture and text attend to each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastdiff.kernels.attention import attention
from fastdiff.kernels.joint_attention import joint_attention
from fastdiff.kernels.linear import linear
from fastdiff.kernels.qk_norm import qk_norm
from fastdiff.kernels.residual import residual
from fastdiff.models.blocks import require, split_heads
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.perturbed import appended, attention_to_text
from fastdiff.models.reads import Reader
from fastdiff.models.rotary import Turns
from fastdiff.models.switches import Switch
from fastdiff.models.watch import kind

PROCESSOR = "JointAttnProcessor2_0"
PERTURBING = {"PAGJointAttnProcessor2_0": 2, "PAGCFGJointAttnProcessor2_0": 3}
"""The processors of perturbed attention, and into how many parts they divide the batch."""
IP_PROCESSOR = "SD3IPAdapterJointAttnProcessor2_0"
"""diffusers' attention processor with an IP-Adapter."""


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorms of queries and keys, per head, and their rotary embedding."""

    q: Tensor | None
    k: Tensor | None
    eps: float

    def __call__(self, q: Tensor, k: Tensor, turns: Turns | None = None) -> tuple[Tensor, Tensor]:
        return qk_norm(q, k, self.q, self.k, self.eps, *(turns or (None, None)))


class Image(NamedTuple):
    """What an IP-Adapter adds to one attention."""

    tokens: Tensor
    """[B, tokens, 2·D]: keys, then values."""
    scale: Tensor
    """[B, D]"""


@dataclass(frozen=True)
class TextAttention:
    """The text's part of a joint attention."""

    qkv: Weights
    """Only K and V if the text's result is not used."""
    norms: HeadNorms | None
    out: Weights | None
    """None if the text's result is not used."""


@dataclass(frozen=True)
class JointAttention:
    """A picture's attention to itself, to a text and to an IP-Adapter's tokens."""

    heads: int
    qkv: Weights
    norms: HeadNorms | None
    out: Weights
    text: TextAttention | None
    image_norms: HeadNorms | None
    """Norms for the picture's own queries and keys in its attention to an IP-Adapter's tokens."""

    def __call__(
        self,
        x: Tensor,
        text: Tensor | None = None,
        text_bias: Tensor | None = None,
        image: Image | None = None,
        perturbed: int = 0,
        turns: tuple[Turns | None, Turns | None] = (None, None),
        pictures: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x [B, L, D], text [B, T, D] -> the same shapes; None for an unused result. `turns`: of
        the picture's tokens and of the text's.

        The third result [B, L, D] is what x sees of `pictures`, IP-Adapters' tokens
        [B, tokens, 2·D] each (keys, then scaled values), without positions; None if there are none.

        In the last `perturbed` samples, a token of the picture attends to itself and to the text
        only. If there are any, nothing is normalised in the others either, as in diffusers.
        """
        q, k, v = split_heads(linear(x, self.qkv.weight, self.qkv.bias), 3, self.heads)
        normed = (q, k) if self.norms is None or perturbed else self.norms(q, k, turns[0])
        if text is None or self.text is None:
            seen, told = attention(*normed, v), None
        else:
            text_q, text_k, text_v = self._of_text(text, not perturbed, turns[1])
            seen, told = joint_attention(*normed, v, text_q, text_k, text_v, text_bias=text_bias)
            if perturbed:
                q, k, v, text_k, text_v = (t[-perturbed:] for t in (q, k, v, text_k, text_v))
                alone = attention_to_text(q, k, v, text_k, text_v, text_bias)
                seen = appended(seen[:-perturbed], alone)
        seen = seen.flatten(2)
        if image is not None and self.image_norms is not None:
            image_k, image_v = split_heads(image.tokens, 2, self.heads)
            more, _ = joint_attention(*self.image_norms(q, k), v, None, image_k, image_v)
            seen = residual(seen, more.flatten(2), gate=image.scale)
        seen = linear(seen, self.out.weight, self.out.bias)
        if told is None or self.text is None or self.text.out is None:
            return seen, None, None
        told = linear(told.flatten(2), self.text.out.weight, self.text.out.bias)
        return seen, told, self._apart(q, k, pictures)

    def _apart(self, q: Tensor, k: Tensor, pictures: Sequence[Tensor]) -> Tensor | None:
        """What queries without positions see of each of `pictures`, summed."""
        found: Tensor | None = None
        for tokens in pictures:
            if found is None and self.norms is not None:
                q, _ = self.norms(q, k)
            key, value = split_heads(tokens, 2, self.heads)
            one: Tensor = attention(q, key, value).flatten(2)
            found = one if found is None else residual(found, one)
        return found

    def _of_text(
        self, text: Tensor, normed: bool, turns: Turns | None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        assert self.text is not None
        packed = linear(text, self.text.qkv.weight, self.text.qkv.bias)
        asked = self.text.out is not None
        *queries, k, v = split_heads(packed, 3 if asked else 2, self.heads)
        q = queries[0] if asked else k
        if self.text.norms is not None and normed:
            q, k = self.text.norms(q, k, turns)
        return q if asked else None, k, v


def borrow_head_norms(q: Any, k: Any, loan: Loan) -> HeadNorms | None:
    """From RMSNorms of queries and of keys; None if both are None."""
    require((q is None) == (k is None), "queries and keys of which only one is normalised")
    if q is None:
        return None
    (q_weight, eps), (k_weight, k_eps) = loan.rms_norm(q), loan.rms_norm(k)
    require(eps == k_eps, "norms of queries and keys with different eps")
    return HeadNorms(q_weight, k_weight, eps)


def open_joint_attention(
    module: Any, loan: Loan, switches: list[Switch] | None = None
) -> tuple[Reader, Any]:
    """Read an Attention with one of SD3's processors; also returns the last layer of its output.

    `switches`: where its processor may be exchanged for a perturbing one, the list that gets its
    switch.
    """
    attention = loan.open(module, "Attention")
    processor = kind(module.processor)
    if switches is not None and processor in (PROCESSOR, *PERTURBING):
        switches.append(loan.switch(module, "processor", PROCESSOR, *PERTURBING))
    else:
        processor = kind(attention.processor)
        require(processor in (PROCESSOR, IP_PROCESSOR), f"the attention processor {processor}")
        held = loan.open(attention.processor, processor)
        backend = getattr(held, "_attention_backend", None)
        require(backend is None, "an attention backend that was set")
    width = loan.width(attention.to_q)
    require(width % attention.heads == 0, f"{attention.heads} heads of {width} columns")
    out, dropout = loan.each(attention.to_out, 2)
    loan.inert(dropout)
    return attention, out


def borrow_joint_attention(
    module: Any,
    loan: Loan,
    text: bool = False,
    asked: bool = False,
    switches: list[Switch] | None = None,
) -> JointAttention:
    """From an Attention; `text`: also its text part; `asked`: whether the text's result is used;
    `switches`: see `open_joint_attention`."""
    attention, out = open_joint_attention(module, loan, switches)
    return JointAttention(
        heads=attention.heads,
        qkv=loan.linear(attention.to_q, attention.to_k, attention.to_v),
        norms=borrow_head_norms(attention.norm_q, attention.norm_k, loan),
        out=loan.linear(out),
        text=_borrow_text(attention, loan, asked) if text else None,
        image_norms=_borrow_image_norms(module.processor, loan),
    )


def _borrow_text(attention: Reader, loan: Loan, asked: bool) -> TextAttention:
    q, k, v = attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
    norm_q, norm_k = attention.norm_added_q, attention.norm_added_k
    require(not (asked and attention.context_pre_only), "attention that does not update its text")
    if asked:
        qkv, norms = loan.linear(q, k, v), borrow_head_norms(norm_q, norm_k, loan)
        return TextAttention(qkv, norms, loan.linear(attention.to_add_out))
    for dead in (q, norm_q, attention.to_add_out):
        loan.unused(dead)
    norms = None
    if norm_k is not None:
        weight, eps = loan.rms_norm(norm_k)
        norms = HeadNorms(weight, weight, eps)
    return TextAttention(loan.linear(k, v), norms, None)


def _borrow_image_norms(processor: Any, loan: Loan) -> HeadNorms | None:
    if kind(processor) != IP_PROCESSOR:
        return None
    held = loan.open(processor, IP_PROCESSOR)
    return borrow_head_norms(held.norm_q, held.norm_k, loan)
