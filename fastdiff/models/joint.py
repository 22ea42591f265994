"""The blocks of SD3's MM-DiT, on borrowed weights: picture and text attend to each other.

A block's norms are modulated by vectors that depend only on the timestep and the pooled text. The
vectors of all norms are side by side in `row`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastdiff.kernels.attention import attention
from fastdiff.kernels.joint_attention import joint_attention
from fastdiff.kernels.linear import linear
from fastdiff.kernels.qk_norm import qk_norm
from fastdiff.kernels.residual import residual
from fastdiff.models.blocks import Columns, require
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.reads import Reader
from fastdiff.models.stream import Stream
from fastdiff.models.watch import kind

PROCESSOR = "JointAttnProcessor2_0"
IP_PROCESSOR = "SD3IPAdapterJointAttnProcessor2_0"
"""diffusers' attention processor with an IP-Adapter."""
_VECTORS = {"AdaLayerNormZero": 6, "SD35AdaLayerNormZeroX": 9, "AdaLayerNormContinuous": 2}
"""The number of vectors that a norm of each class takes."""


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorms of queries and keys, per head."""

    q: Tensor | None
    k: Tensor | None
    eps: float

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm(q, k, self.q, self.k, self.eps)


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
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, L, D], text [B, T, D] -> the same shapes; None for an unused result."""
        q, k, v = self._heads(linear(x, self.qkv.weight, self.qkv.bias), 3)
        normed = (q, k) if self.norms is None else self.norms(q, k)
        if text is None or self.text is None:
            seen, told = attention(*normed, v), None
        else:
            text_q, text_k, text_v = self._of_text(text)
            seen, told = joint_attention(*normed, v, text_q, text_k, text_v, text_bias=text_bias)
        seen = seen.flatten(2)
        if image is not None and self.image_norms is not None:
            image_k, image_v = self._heads(image.tokens, 2)
            more, _ = joint_attention(*self.image_norms(q, k), v, None, image_k, image_v)
            seen = residual(seen, more.flatten(2), gate=image.scale)
        seen = linear(seen, self.out.weight, self.out.bias)
        if told is None or self.text is None or self.text.out is None:
            return seen, None
        return seen, linear(told.flatten(2), self.text.out.weight, self.text.out.bias)

    def _of_text(self, text: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        assert self.text is not None
        packed = linear(text, self.text.qkv.weight, self.text.qkv.bias)
        asked = self.text.out is not None
        *queries, k, v = self._heads(packed, 3 if asked else 2)
        q = queries[0] if asked else k
        if self.text.norms is not None:
            q, k = self.text.norms(q, k)
        return q if asked else None, k, v

    def _heads(self, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, L, parts·D] -> [B, L, heads, D / heads] for each part."""
        heads: Tensor = packed.unflatten(-1, (parts, self.heads, -1))
        return heads.unbind(2)


@dataclass(frozen=True)
class MLP:
    eps: float
    up: Weights
    down: Weights

    def __call__(self, x: Stream, shift: Tensor, scale: Tensor, gate: Tensor) -> Stream:
        h = x.normed(self.eps, shift, scale)
        h = linear(h, self.up.weight, self.up.bias, act="gelu_tanh")
        return Stream(linear(h, self.down.weight, self.down.bias), gate, x.closed())


@dataclass(frozen=True)
class Modulated:
    """A LayerNorm without weights, and the position of its vectors in `row`."""

    eps: float
    columns: slice
    count: int

    def vectors(self, row: Tensor) -> tuple[Tensor, ...]:
        """[B, D] each. If there are two, the scale comes first; otherwise the shift."""
        return row[:, self.columns].chunk(self.count, 1)


@dataclass(frozen=True)
class JointBlock:
    """One layer; without `text`, only the picture's part."""

    norm: Modulated
    attention: JointAttention
    own: JointAttention | None
    """SD3.5-medium's second attention: the picture attends only to itself."""
    mlp: MLP
    text_norm: Modulated | None
    text_mlp: MLP | None
    """None if the text's result is not used."""

    def __call__(
        self,
        picture: Stream,
        text: Stream | None,
        row: Tensor,
        text_bias: Tensor | None = None,
        images: tuple[Image | None, ...] = (None, None),
    ) -> tuple[Stream, Stream | None]:
        """`row`: [B, all vectors]. `images`: for `attention` and `own`. The returned text is None
        if its result is not used."""
        shift, scale, gate, *vectors = self.norm.vectors(row)
        h = picture.normed(self.norm.eps, shift, scale)
        h_text, text_vectors = None, list[Tensor]()
        if text is not None and self.text_norm is not None:
            first, second, *text_vectors = self.text_norm.vectors(row)
            shift, scale = (first, second) if text_vectors else (second, first)
            h_text = text.normed(self.text_norm.eps, shift, scale)
        seen, told = self.attention(h, h_text, text_bias, images[0])
        x = picture.closed()
        if self.own is not None:
            own_shift, own_scale, own_gate = vectors[3:]
            h = picture.normed(self.norm.eps, own_shift, own_scale)
            x, gate = residual(x, seen, gate=gate), own_gate
            seen, _ = self.own(h, image=images[1])
        picture = self.mlp(Stream(seen, gate, x), *vectors[:3])
        if text is None or told is None or self.text_mlp is None:
            return picture, None
        gate, *rest = text_vectors
        return picture, self.text_mlp(Stream(told, gate, text.closed()), *rest)


def borrow_modulated(module: Any, loan: Loan, rows: Columns, width: int, name: str) -> Modulated:
    """From the norm of class `name`; `rows` assigns columns of the packed modulations."""
    norm, count = loan.open(module, name), _VECTORS[name]
    require(getattr(norm, "emb", None) is None, "a norm with an embedding of its own")
    loan.silu(norm.silu)
    columns = rows.take(norm.linear)
    require(
        columns.stop - columns.start == count * width, "a norm whose width differs from its block's"
    )
    return Modulated(loan.bare_norm(norm.norm, width), columns, count)


def borrow_mlp(norm: Any, module: Any, loan: Loan, width: int) -> MLP:
    """From a LayerNorm and the FeedForward after it."""
    gelu, dropout, down = loan.each(loan.open(module, "FeedForward").net, 3)
    loan.inert(dropout)
    up = loan.open(gelu, "GELU")
    require(up.approximate == "tanh", f"a GELU of kind {up.approximate!r}")
    return MLP(loan.bare_norm(norm, width), loan.linear(up.proj), loan.linear(down))


def borrow_head_norms(q: Any, k: Any, loan: Loan) -> HeadNorms | None:
    """From RMSNorms of queries and of keys; None if both are None."""
    require((q is None) == (k is None), "queries and keys of which only one is normalised")
    if q is None:
        return None
    (q_weight, eps), (k_weight, k_eps) = loan.rms_norm(q), loan.rms_norm(k)
    require(eps == k_eps, "norms of queries and keys with different eps")
    return HeadNorms(q_weight, k_weight, eps)


def open_joint_attention(module: Any, loan: Loan) -> tuple[Reader, Any]:
    """Read an Attention with one of SD3's processors; also returns the last layer of its output."""
    attention = loan.open(module, "Attention")
    processor = kind(attention.processor)
    require(processor in (PROCESSOR, IP_PROCESSOR), f"the attention processor {processor}")
    held = loan.open(attention.processor, processor)
    require(getattr(held, "_attention_backend", None) is None, "an attention backend that was set")
    width = loan.width(attention.to_q)
    require(width % attention.heads == 0, f"{attention.heads} heads of {width} columns")
    out, dropout = loan.each(attention.to_out, 2)
    loan.inert(dropout)
    return attention, out


def borrow_joint_attention(
    module: Any, loan: Loan, text: bool = False, asked: bool = False
) -> JointAttention:
    """From an Attention; `text`: also its text part; `asked`: whether the text's result is used."""
    attention, out = open_joint_attention(module, loan)
    return JointAttention(
        heads=attention.heads,
        qkv=loan.linear(attention.to_q, attention.to_k, attention.to_v),
        norms=borrow_head_norms(attention.norm_q, attention.norm_k, loan),
        out=loan.linear(out),
        text=_borrow_text(attention, loan, asked) if text else None,
        image_norms=_borrow_image_norms(attention.processor, loan),
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


def borrow_joint_block(
    module: Any, loan: Loan, rows: Columns, width: int, asked: bool
) -> JointBlock:
    """From a JointTransformerBlock; `asked`: whether the text's result is used."""
    block = loan.open(module, "JointTransformerBlock")
    require(block._chunk_size is None, "a feed-forward layer in chunks")
    last = bool(block.context_pre_only)
    require(not (last and asked), "a block before the last that drops its text")
    dual = bool(block.use_dual_attention)
    zero = "SD35AdaLayerNormZeroX" if dual else "AdaLayerNormZero"
    context = "AdaLayerNormContinuous" if last else "AdaLayerNormZero"
    if not asked:
        loan.unused(block.norm2_context)
        loan.unused(block.ff_context)
    return JointBlock(
        norm=borrow_modulated(block.norm1, loan, rows, width, zero),
        attention=borrow_joint_attention(block.attn, loan, text=True, asked=asked),
        own=borrow_joint_attention(block.attn2, loan) if dual else None,
        mlp=borrow_mlp(block.norm2, block.ff, loan, width),
        text_norm=borrow_modulated(block.norm1_context, loan, rows, width, context),
        text_mlp=borrow_mlp(block.norm2_context, block.ff_context, loan, width) if asked else None,
    )
