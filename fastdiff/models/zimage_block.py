"""The blocks of Z-Image, on borrowed weights: one sequence, RMSNorms before and after each branch.

Sequences of several lengths lie one behind the other, as one of all their tokens.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastdiff.kernels.ada_norm import ada_norm
from fastdiff.kernels.attention import attention
from fastdiff.kernels.geglu import geglu
from fastdiff.kernels.linear import linear
from fastdiff.kernels.qk_norm import qk_norm
from fastdiff.models.blocks import Columns, require, split_heads
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.sequences import chained
from fastdiff.models.watch import kind

PROCESSOR = "ZSingleStreamAttnProcessor"


class Group(NamedTuple):
    """Sequences of one length whose tokens have the same positions."""

    many: int
    cos: Tensor
    """[S, K] float32: how far the pairs of a head's columns are turned, as `qk_norm` takes it."""
    sin: Tensor


class Pending(NamedTuple):
    """total + gate · branch, [R, M, D]: the next norm's kernel adds them."""

    branch: Tensor
    gate: Tensor | None = None
    """[R, D]"""
    total: Tensor | None = None


@dataclass(frozen=True)
class RMS:
    """An RMSNorm over all columns."""

    weight: Tensor | None
    eps: float

    def __call__(
        self, x: Tensor, scale: Tensor | None = None, gate: Tensor | None = None, **more: Any
    ) -> tuple[Tensor, Tensor]:
        return ada_norm(x, self.eps, self.weight, scale=scale, gate=gate, rms=True, **more)


@dataclass(frozen=True)
class Block:
    heads: int
    norms: tuple[RMS, RMS, RMS, RMS]
    """Before and after attention, then before and after the feed-forward layer."""
    vectors: slice | None
    """Which part of a row holds scale and gate of attention and of the feed-forward layer; None if
    there are none."""
    qkv: Weights
    head_norms: tuple[RMS, RMS]
    """The norms of each head of queries and of keys."""
    out: Weights
    up: Weights
    """Values, then gates."""
    down: Weights

    def __call__(self, x: Pending, groups: tuple[Group, ...], row: Tensor | None) -> Pending:
        """`row`: [R, all vectors], gates after their tanh; one group has R sequences, several lie
        one behind the other, R is 1."""
        scale = gate = mlp_scale = mlp_gate = None
        if row is not None and self.vectors is not None:
            scale, gate, mlp_scale, mlp_gate = row[:, self.vectors].chunk(4, 1)
        before, after, mlp_before, mlp_after = self.norms
        h, total = before(x.branch, scale, x.gate, residual=x.total)
        total = x.branch if x.total is None else total
        seen = self._attended(linear(h, self.qkv.weight, self.qkv.bias), groups)
        seen, _ = after(linear(seen, self.out.weight, self.out.bias))
        h, total = mlp_before(seen, mlp_scale, gate, residual=total)
        h = geglu(h, self.up.weight, self.up.bias, act="silu")
        h, _ = mlp_after(linear(h, self.down.weight, self.down.bias))
        return Pending(h, mlp_gate, total)

    def _attended(self, packed: Tensor, groups: tuple[Group, ...]) -> Tensor:
        """[R, M, 3·D] -> [R, M, D]."""
        flat, start, seen = packed.flatten(0, 1), 0, []
        for group in groups:
            tokens = group.many * len(group.cos)
            part = flat[start : start + tokens].unflatten(0, (group.many, -1))
            q, k, v = split_heads(part, 3, self.heads)
            norm_q, norm_k = self.head_norms
            q, k = qk_norm(q, k, norm_q.weight, norm_k.weight, norm_q.eps, group.cos, group.sin)
            seen.append(attention(q, k, v).flatten(2).flatten(0, 1))
            start += tokens
        return chained(seen).view(*packed.shape[:2], -1)


def borrow_rms(module: Any, loan: Loan, width: int) -> RMS:
    """From diffusers' RMSNorm over `width` columns."""
    weight, eps = loan.rms_norm(module)
    require(weight is None or weight.shape == (width,), "an RMSNorm of another width")
    return RMS(weight, eps)


def borrow_block(module: Any, loan: Loan, rows: Columns | None, width: int) -> Block:
    """From a ZImageTransformerBlock; rows: that assign the columns of its modulation, or None."""
    block = loan.open(module, "ZImageTransformerBlock")
    require(bool(block.modulation) == (rows is not None), "a refiner with other norms")
    held = loan.open(block.attention, "Attention")
    processor = kind(held.processor)
    require(processor == PROCESSOR, f"the attention processor {processor}")
    told = loan.open(held.processor, processor)
    require(told._attention_backend is None, "an attention backend that was set")
    require(told._parallel_config is None, "attention that several GPUs share")
    require(width % held.heads == 0, f"{held.heads} heads of {width} columns")
    out, dropout = loan.each(held.to_out, 2)
    loan.inert(dropout)
    require(held.norm_q is not None and held.norm_k is not None, "heads that are not normalised")
    head = width // held.heads
    head_norms = borrow_rms(held.norm_q, loan, head), borrow_rms(held.norm_k, loan, head)
    require(head_norms[0].eps == head_norms[1].eps, "norms of heads with different eps")
    feed = loan.open(block.feed_forward, "FeedForward")
    columns = None
    if rows is not None:
        (layer,) = loan.each(block.adaLN_modulation, 1)
        columns = rows.take(layer)
        require(columns.stop - columns.start == 4 * width, "a modulation of another width")
    first, second = block.attention_norm1, block.attention_norm2
    norms = (first, second, block.ffn_norm1, block.ffn_norm2)
    one, two, three, four = (borrow_rms(norm, loan, width) for norm in norms)
    return Block(
        heads=held.heads,
        norms=(one, two, three, four),
        vectors=columns,
        qkv=loan.linear(held.to_q, held.to_k, held.to_v),
        head_norms=head_norms,
        out=loan.linear(out),
        up=loan.linear(feed.w3, feed.w1),
        down=loan.linear(feed.w2),
    )
