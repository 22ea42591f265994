"""PixArt's blocks on borrowed weights, and a gate that is folded into the weights around it.

After the self-attention a block computes x + gate · (W s + b), and reads that at once: there is no
norm whose kernel could add it. If all pictures have the same gate, the product uses gate · W and
adds to x as it writes; gate · b becomes part of the biases of the layers that read x next. So
a step multiplies the W of all blocks in one launch, and none of them closes its stream.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.attention import attention
from fastdiff.kernels.linear import linear
from fastdiff.kernels.where import on_gpu
from fastdiff.models.blocks import open_attention, require, split_heads
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.joint import MLP, borrow_mlp
from fastdiff.models.reads import Reader
from fastdiff.models.stream import Stream
from fastdiff.models.transformer import CrossColumns


class Folded(NamedTuple):
    """A block's gate of the self-attention, folded into the weights around it."""

    out: Tensor
    """[D, D] gate · the attention's last layer."""
    q_bias: Tensor
    text_bias: Tensor
    """[D] each: the last layer's bias times the gate."""


@dataclass(frozen=True)
class Folding:
    """The layers of all blocks that the gate is folded into, [blocks, D, D] each."""

    outs: Weights
    """The self-attention's last layer."""
    qs: Weights
    """The cross-attention's queries."""
    text_outs: Weights
    """The cross-attention's last layer."""

    def applies(self, vectors: Tensor) -> bool:
        """Whether [..., n, …] vectors are folded: on a GPU, where a product that adds takes one
        launch; n must be 1."""
        return on_gpu(vectors) and vectors.shape[-2] == 1

    def biases(self, vectors: list[Tensor]) -> list[Tensor]:
        """The biases of `qs` and of `text_outs` with what gate · bias of `outs` adds to them: of
        [steps, 1, 6·D] a block -> [steps, 1, blocks·D] each. [] if nothing is folded."""
        if not self.applies(vectors[0]):
            return []
        gate = torch.stack(vectors).chunk(6, -1)[2].squeeze(2)  # [blocks, steps, D]
        bias, q_bias, text_bias = (
            gate.new_zeros(()) if layers.bias is None else layers.bias[:, None]
            for layers in (self.outs, self.qs, self.text_outs)
        )
        added = gate * bias
        both = torch.bmm(added, self.qs.weight.mT) + q_bias, added + text_bias
        return [told.permute(1, 0, 2).flatten(1).unsqueeze(1) for told in both]

    def at(self, row: Tensor) -> list[Folded | None]:
        """For each block; `row`: [n, …] of vectors, 6·D a block, ends with the `biases`."""
        count, width = self.outs.weight.shape[:2]
        if not self.applies(row):
            return [None] * count
        gates = row[0, : 6 * width * count].view(count, 6, width)[:, 2]
        outs = self.outs.weight * gates[:, :, None]
        biases = row[0, -2 * width * count :].view(2, count, width)
        return [Folded(*one) for one in zip(outs, *biases, strict=True)]


@dataclass(frozen=True)
class Block:
    heads: int
    eps: float
    table: Tensor
    """[6, D]: shift, scale and gate of the self-attention, then of the MLP."""
    qkv: Weights
    out: Weights
    q: Weights
    text: slice
    """This block's columns (K, then V) in the projected text of all blocks."""
    text_out: Weights
    mlp: MLP

    def __call__(
        self,
        picture: Stream,
        vectors: Tensor,
        text: Tensor,
        mask: Tensor | None,
        folded: Folded | None = None,
    ) -> Stream:
        """`vectors`: [n, 6·D], n is 1 or that of the texts."""
        shift, scale, gate, *mlp = vectors.expand(text.shape[0], -1).chunk(6, 1)
        h = picture.normed(self.eps, shift, scale)
        q, k, v = split_heads(linear(h, self.qkv.weight, self.qkv.bias), 3, self.heads)
        seen, asked, text_out = attention(q, k, v).flatten(2), self.q, self.text_out
        if folded is None:
            seen = linear(seen, self.out.weight, self.out.bias)
            x = Stream(seen, gate, picture.closed()).closed()
        else:  # cuBLAS adds to the stream in place as it writes; the norm has made it, for us alone
            x = picture.closed()
            x.flatten(0, 1).addmm_(seen.flatten(0, 1), folded.out.t())
            asked = Weights(asked.weight, folded.q_bias)
            text_out = Weights(text_out.weight, folded.text_bias)
        (q,) = split_heads(linear(x, asked.weight, asked.bias), 1, self.heads)
        k, v = split_heads(text[..., self.text], 2, self.heads)
        told = attention(q, k, v, mask).flatten(2)
        return self.mlp(Stream.product(told, text_out, x), *mlp)


def borrow_blocks(
    modules: list[Any], loan: Loan, text: CrossColumns, width: int
) -> tuple[tuple[Block, ...], Folding]:
    """From BasicTransformerBlocks of the norms "ada_norm_single"."""
    require(len(modules) > 0, "a transformer without blocks")
    opened = [_open_block(module, loan) for module in modules]
    layers = zip(*(one.layers for one in opened), strict=True)
    folding = Folding(*(loan.linear(*alike, apart=True) for alike in layers))
    return tuple(
        _borrow_block(one, loan, text, width, folding, i) for i, one in enumerate(opened)
    ), folding


class _Opened(NamedTuple):
    """A BasicTransformerBlock of the norms "ada_norm_single", and its attentions."""

    block: Reader
    own: Reader
    cross: Reader
    layers: tuple[Any, Any, Any]
    """The self-attention's last layer, the cross-attention's queries and its last layer."""


def _open_block(module: Any, loan: Loan) -> _Opened:
    block: Reader = loan.open(module, "BasicTransformerBlock")
    require(block.norm_type == "ada_norm_single", f"transformer norms of type {block.norm_type}")
    require(block.attn2 is not None, "a transformer block without cross-attention")
    require(not block.only_cross_attention, "cross-attention in place of self-attention")
    require(block.pos_embed is None, "positional embeddings in a transformer block")
    require(getattr(block, "fuser", None) is None, "a gated (GLIGEN) transformer block")
    require(block._chunk_size is None, "a feed-forward layer in chunks")
    own, out = open_attention(block.attn1, loan, residual=False)
    cross, text_out = open_attention(block.attn2, loan, residual=False)
    for part in (own, cross):
        require(part.group_norm is None, "a group norm inside a transformer block's attention")
    require(own.heads == cross.heads, "self- and cross-attention with different heads")
    return _Opened(block, own, cross, (out, cross.to_q, text_out))


def _layer(layers: Weights, i: int) -> Weights:
    return Weights(layers.weight[i], None if layers.bias is None else layers.bias[i])


def _borrow_block(
    opened: _Opened, loan: Loan, text: CrossColumns, width: int, folding: Folding, i: int
) -> Block:
    block, own, cross, _ = opened
    return Block(
        heads=own.heads,
        eps=loan.bare_norm(block.norm1, width),
        table=loan.parameter(block.scale_shift_table),
        qkv=loan.linear(own.to_q, own.to_k, own.to_v),
        out=_layer(folding.outs, i),
        q=_layer(folding.qs, i),
        text=text.take_cross(cross),
        text_out=_layer(folding.text_outs, i),
        mlp=borrow_mlp(block.norm2, block.ff, loan, width),
    )
