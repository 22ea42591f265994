"""The blocks of AuraFlow, on borrowed weights; a block of a picture and a text has two branches."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastdiff.kernels.ada_norm import ada_norm
from fastdiff.kernels.geglu import geglu
from fastdiff.kernels.linear import linear
from fastdiff.models.blocks import Columns, require, split_heads
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.joint import Modulated, borrow_modulated
from fastdiff.models.stream import Stream
from fastdiff.models.watch import kind

PROCESSOR = "AuraFlowAttnProcessor2_0"


@dataclass(frozen=True)
class Branch:
    """What a block does to one sequence [B, L, D] before and after its attention."""

    heads: int
    norm: Modulated
    qk: Weights
    v: Weights
    head_eps: float
    """The eps of the LayerNorm of each head of queries and keys."""
    out: Weights
    eps: float
    """The eps of the norm after attention."""
    up: Weights
    """Values, then gates."""
    down: Weights

    def heads_of(self, x: Stream, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, L, H, K]; `row`: [B, all vectors]."""
        shift, scale, *_ = self.norm.vectors(row)
        h = x.normed(self.norm.eps, shift, scale)
        both = linear(h, self.qk.weight, self.qk.bias)
        batch, length, wide = both.shape
        heads = both.view(batch, length * 2 * self.heads, wide // (2 * self.heads))
        normed, _ = ada_norm(heads, self.head_eps)
        q, k = split_heads(normed.view(batch, length, wide), 2, self.heads)
        (v,) = split_heads(linear(h, self.v.weight, self.v.bias), 1, self.heads)
        return q, k, v

    def after(self, seen: Tensor, x: Stream, row: Tensor) -> Stream:
        """The stream after the feed-forward layer; seen: [B, L, H, K], what was attended to."""
        gate, shift, scale, mlp_gate = self.norm.vectors(row)[2:]
        seen, total = linear(seen.flatten(2), self.out.weight, self.out.bias), x.closed()
        h, _ = ada_norm(seen, self.eps, scale=scale, shift=shift, gate=gate, residual=total)
        h = geglu(h, self.up.weight, self.up.bias, act="silu")
        return Stream(linear(h, self.down.weight, self.down.bias), mlp_gate, total)


def borrow_joint(module: Any, loan: Loan, rows: Columns, width: int) -> tuple[Branch, Branch]:
    """From an AuraFlowJointTransformerBlock: the picture's branch and the text's."""
    block = loan.open(module, "AuraFlowJointTransformerBlock")
    held = _open_attention(block.attn, loan)
    out, dropout = loan.each(held.to_out, 2)
    loan.inert(dropout)
    picture = (held.to_q, held.to_k, held.to_v, held.norm_q, held.norm_k, out)
    text = (
        *(held.add_q_proj, held.add_k_proj, held.add_v_proj),
        *(held.norm_added_q, held.norm_added_k, held.to_add_out),
    )
    context = block.norm1_context, block.norm2_context, block.ff_context
    return (
        _borrow(held.heads, (block.norm1, block.norm2, block.ff), picture, loan, rows, width),
        _borrow(held.heads, context, text, loan, rows, width),
    )


def borrow_single(module: Any, loan: Loan, rows: Columns, width: int) -> Branch:
    """From an AuraFlowSingleTransformerBlock."""
    block = loan.open(module, "AuraFlowSingleTransformerBlock")
    held = _open_attention(block.attn, loan)
    out, dropout = loan.each(held.to_out, 2)
    loan.inert(dropout)
    layers = (held.to_q, held.to_k, held.to_v, held.norm_q, held.norm_k, out)
    return _borrow(held.heads, (block.norm1, block.norm2, block.ff), layers, loan, rows, width)


def _open_attention(module: Any, loan: Loan) -> Any:
    held = loan.open(module, "Attention")
    processor = kind(held.processor)
    require(processor == PROCESSOR, f"the attention processor {processor}")
    loan.open(held.processor, processor)
    width = loan.width(held.to_q)
    require(width % held.heads == 0, f"{held.heads} heads of {width} columns")
    scaled = math.isclose(held.scale, (held.heads / width) ** 0.5)
    require(scaled, f"attention scaled by {held.scale}")
    return held


def _borrow(
    heads: int,
    parts: tuple[Any, Any, Any],
    layers: tuple[Any, Any, Any, Any, Any, Any],
    loan: Loan,
    rows: Columns,
    width: int,
) -> Branch:
    """parts: both norms and the feed-forward layer; layers: q, k, v, the norms of q and k, out."""
    (norm, after, feed), (q, k, v, norm_q, norm_k, out) = parts, layers
    gated = loan.open(feed, "AuraFlowFeedForward")
    require(norm_q is not None and norm_k is not None, "queries or keys that are not normalised")
    head = loan.width(q) // heads
    eps, k_eps = loan.bare_norm(norm_q, head), loan.bare_norm(norm_k, head)
    require(eps == k_eps, "norms of queries and keys with different eps")
    return Branch(
        heads=heads,
        norm=borrow_modulated(norm, loan, rows, width, "AdaLayerNormZero"),
        qk=loan.linear(q, k),
        v=loan.linear(v),
        head_eps=eps,
        out=loan.linear(out),
        eps=loan.bare_norm(after, width),
        up=loan.linear(gated.linear_2, gated.linear_1),
        down=loan.linear(gated.out_projection),
    )
