"""A layer of UnCLIP's prior, on borrowed weights."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastdiff.kernels.attention import attention
from fastdiff.kernels.linear import linear
from fastdiff.models.blocks import open_attention, require
from fastdiff.models.borrow import Loan, Norm, Weights
from fastdiff.models.sums import Sum, projected


@dataclass(frozen=True)
class Block:
    """Self-attention and an MLP, each after a LayerNorm, with a residual."""

    heads: int
    norm1: Norm
    qkv: Weights
    out: Weights
    norm2: Norm
    up: Weights
    down: Weights

    def packed(self, x: Sum) -> Tensor:
        """Queries, keys and values: [B, L, D] -> [B, L, 3·D]."""
        return linear(x.layer_normed(self.norm1), self.qkv.weight, self.qkv.bias)

    def __call__(self, x: Sum, asking: Tensor, seen: Tensor, mask: Tensor) -> Sum:
        """x [B, L, D]; `asking` [B, L, 3·D] has its queries, `seen` [B, L', 3·D] the keys and
        values; mask [B, 1, L, L'] is added to the scores."""
        q, k, v = (
            self._heads(packed, part) for packed, part in ((asking, 0), (seen, 1), (seen, 2))
        )
        x = projected(attention(q, k, v, mask).flatten(2), self.out, x.closed())
        h = linear(x.layer_normed(self.norm2), self.up.weight, self.up.bias, act="gelu")
        return projected(h, self.down, x.closed())

    def _heads(self, packed: Tensor, part: int) -> Tensor:
        heads: Tensor = packed.chunk(3, -1)[part].unflatten(-1, (self.heads, -1))
        return heads


def borrow_prior_block(module: Any, loan: Loan) -> Block:
    """From a BasicTransformerBlock without cross-attention."""
    block = loan.open(module, "BasicTransformerBlock")
    require(block.norm_type == "layer_norm", f"transformer norms of type {block.norm_type}")
    require(block.attn2 is None, "cross-attention in a prior")
    require(not block.only_cross_attention, "cross-attention in place of self-attention")
    require(block.pos_embed is None, "positional embeddings in a transformer block")
    require(block._chunk_size is None, "a feed-forward layer in chunks")
    attention, out = open_attention(block.attn1, loan, residual=False)
    require(attention.group_norm is None, "a group norm inside a transformer block's attention")
    up, dropout, down = loan.each(loan.open(block.ff, "FeedForward").net, 3)
    loan.inert(dropout)
    gelu = loan.open(up, "GELU")
    require(gelu.approximate == "none", f"a GELU of kind {gelu.approximate!r}")
    return Block(
        heads=attention.heads,
        norm1=loan.norm(block.norm1),
        qkv=loan.linear(attention.to_q, attention.to_k, attention.to_v),
        out=loan.linear(out),
        norm2=loan.norm(block.norm3),
        up=loan.linear(gelu.proj),
        down=loan.linear(down),
    )
