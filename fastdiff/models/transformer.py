"""The transformers between a U-Net's resnets, on borrowed weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastdiff.kernels.attention import attention
from fastdiff.kernels.geglu import geglu
from fastdiff.kernels.linear import linear
from fastdiff.models.blocks import (
    PLAIN_PROCESSORS,
    Columns,
    open_attention,
    repeated,
    require,
    shared,
)
from fastdiff.models.borrow import Loan, Norm, Weights
from fastdiff.models.ip_adapter import PROCESSOR
from fastdiff.models.lora import base_of
from fastdiff.models.perturbed import Perturbed, appended
from fastdiff.models.reads import Reader
from fastdiff.models.sums import Sum, closing, projected
from fastdiff.models.switches import Switch
from fastdiff.models.watch import kind


class CrossColumns(Columns):
    """Columns of the text's keys and values, the cross-attentions that use them, and the processors
    of the self-attentions."""

    def __init__(self, loan: Loan) -> None:
        super().__init__(loan)
        self.attentions: list[Reader] = []
        self.norms: list[tuple[slice, Norm]] = []
        """Columns of attentions that normalise the text first, and their norms."""
        self.switches: list[Switch] = []

    def take_cross(self, attention: Reader) -> slice:
        self.attentions.append(attention)
        return self.take(attention.to_k, attention.to_v)

    def take_added(self, attention: Reader, loan: Loan) -> slice:
        """For an attention that reads the text and its own pixels (`added_kv`)."""
        columns, norm = self.take(attention.add_k_proj, attention.add_v_proj), attention.norm_cross
        if norm is not None:
            loan.open(norm, nn.GroupNorm)
            self.norms.append((columns, loan.norm(norm)))
        return columns


@dataclass(frozen=True)
class Block:
    """Self-attention, cross-attention, GEGLU; each after a LayerNorm, with a residual."""

    heads: int
    number: int
    """The number of its self-attention in the network; -1 if it has none."""
    norm1: Norm
    qkv: Weights
    """Only q if the first attention reads the text, too."""
    own: slice | None
    """The columns that the first attention reads of the text; None: it reads its own pixels."""
    out1: Weights
    norm2: Norm
    q: Weights
    text: slice
    """This block's columns (K, then V) in the projected text, or image prompts, of all blocks."""
    out2: Weights
    norm3: Norm
    geglu: Weights
    ff: Weights

    def __call__(
        self,
        x: Sum,
        text: Tensor,
        images: Sequence[Tensor],
        mask: Tensor | None,
        perturbed: Perturbed | None = None,
        last: bool = False,
    ) -> Sum:
        """x [B, L, C], text [B, 2B or 3B, T, …]; x is repeated where the texts, or the perturbed
        attentions, begin to differ. last: no norm follows.

        `images` [B, 2B or 3B like the text, tokens, …]: what IP-Adapters add to the text's
        attention.
        """
        identical = 0
        if perturbed is not None:
            batch, plain = text.shape[0], perturbed.plain(text.shape[0])
            if self.number in perturbed.layers:
                identical = batch - plain
                if x.batch < batch:
                    x = Sum(repeated(repeated(x.closed(), plain), batch))
            elif x.batch < batch:
                text, images = text[:plain], [image[:plain] for image in images]
        h = x.layer_normed(self.norm1)
        if self.own is None:
            seen = self._attend_to_itself(h, identical)
        else:
            k, v = self._heads(text[..., self.own], 2)
            seen = attention(self._queries(h, self.qkv, text), k, v).flatten(2)
        x = projected(seen, self.out1, x.closed())
        q = self._queries(x.layer_normed(self.norm2), self.q, text)
        k, v = self._heads(text[..., self.text], 2)
        x = projected(attention(q, k, v, mask).flatten(2), self.out2, x.closed())
        for image in images:
            if image.shape[1] > 0:
                k, v = self._heads(image[..., self.text], 2)
                unbiased = Weights(self.out2.weight, None)
                x = projected(attention(q, k, v).flatten(2), unbiased, x.closed())
        if last:
            return closing(x, self.norm3, self._gated, self.ff)
        return projected(self._gated(x.layer_normed(self.norm3)), self.ff, x.closed())

    def _gated(self, h: Tensor) -> Tensor:
        return geglu(h, self.geglu.weight, self.geglu.bias)

    def _attend_to_itself(self, h: Tensor, identical: int) -> Tensor:
        """Before the output's layer; in the last `identical` pictures the values themselves."""
        plain, last = h[: len(h) - identical], h[len(h) - identical :]
        q, k, v = self._heads(linear(plain, self.qkv.weight, self.qkv.bias), 3)
        seen = attention(q, k, v).flatten(2)
        if not identical:
            return seen
        weight, bias = self.qkv.weight.chunk(3)[2], self.qkv.bias
        values = linear(last, weight, None if bias is None else bias.chunk(3)[2])
        return appended(seen, values)

    def _heads(self, packed: Tensor, parts: int) -> list[Tensor]:
        """`parts` tensors [B, L, H, K] that lie side by side."""
        split = (-1, (self.heads, packed.shape[-1] // parts // self.heads))
        return [part.unflatten(*split) for part in packed.chunk(parts, -1)]

    def _queries(self, h: Tensor, weights: Weights, text: Tensor) -> Tensor:
        """One for each text; attention reads any strides, and the layers after it use x as the
        residual of both halves."""
        (q,) = self._heads(linear(h, weights.weight, weights.bias), 1)
        texts = text.shape[0]
        return q.expand(texts, -1, -1, -1) if q.shape[0] == 1 else repeated(q, texts)


def borrow_block(module: Any, loan: Loan, text: CrossColumns) -> Block:
    """From a BasicTransformerBlock."""
    block = loan.open(module, "BasicTransformerBlock")
    require(block.norm_type == "layer_norm", f"transformer norms of type {block.norm_type}")
    require(block.attn2 is not None, "a transformer block without cross-attention")
    require(block.pos_embed is None, "positional embeddings in a transformer block")
    require(getattr(block, "fuser", None) is None, "a gated (GLIGEN) transformer block")
    told = bool(block.only_cross_attention)
    switches = None if told else text.switches
    own, out1 = open_attention(block.attn1, loan, residual=False, switches=switches)
    either = (*PLAIN_PROCESSORS, PROCESSOR)
    cross, out2 = open_attention(block.attn2, loan, residual=False, processors=either)
    gate, dropout, ff = loan.each(loan.open(block.ff, "FeedForward").net, 3)
    loan.inert(dropout)
    for part in (own, cross):
        require(part.group_norm is None, "a group norm inside a transformer block's attention")
    require(own.heads == cross.heads, "self- and cross-attention with different heads")
    return Block(
        heads=own.heads,
        number=-1 if told else len(text.switches) - 1,
        norm1=loan.norm(block.norm1),
        qkv=loan.linear(own.to_q) if told else loan.linear(own.to_q, own.to_k, own.to_v),
        own=text.take_cross(own) if told else None,
        out1=loan.linear(out1),
        norm2=loan.norm(block.norm2),
        q=loan.linear(cross.to_q),
        text=text.take_cross(cross),
        out2=loan.linear(out2),
        norm3=loan.norm(block.norm3),
        geglu=loan.linear(loan.open(gate, "GEGLU").proj),
        ff=loan.linear(ff),
    )


@dataclass(frozen=True)
class Transformer:
    norm: Norm
    proj_in: Weights
    blocks: tuple[Block, ...]
    proj_out: Weights

    def __call__(
        self,
        x: Sum,
        text: Tensor | None,
        images: Sequence[Tensor],
        mask: Tensor | None,
        perturbed: Perturbed | None = None,
    ) -> Sum:
        assert text is not None
        h = x.group_normed(self.norm, "none").flatten(1, 2)
        tokens = Sum(linear(h, self.proj_in.weight, self.proj_in.bias))
        for block in self.blocks:
            last = block is self.blocks[-1]
            tokens = block(tokens, text, images, mask, perturbed, last)
        around = x.closed()
        h = tokens.closed().unflatten(1, around.shape[1:3])
        return projected(h, self.proj_out, shared(around, tokens.batch))


def borrow_transformer(module: Any, loan: Loan, text: CrossColumns) -> Transformer:
    """From a Transformer2DModel for pictures, with linear or 1×1-convolution projections."""
    transformer = loan.open(module, "Transformer2DModel")
    require(transformer.is_input_continuous, "a transformer of patches or codes")
    inwards, outwards = transformer.proj_in, transformer.proj_out
    for layer in map(base_of, (inwards, outwards)):
        flat = isinstance(layer, nn.Linear)
        require(flat == bool(transformer.use_linear_projection), f"a {kind(layer)} as projection")
    blocks = loan.each(transformer.transformer_blocks)
    return Transformer(
        norm=loan.norm(transformer.norm),
        proj_in=loan.linear(inwards),
        blocks=tuple(borrow_block(block, loan, text) for block in blocks),
        proj_out=loan.linear(outwards),
    )
