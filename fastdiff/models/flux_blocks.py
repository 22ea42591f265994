"""The blocks of FLUX's transformer, on borrowed weights: with two streams, then with one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastdiff.kernels.attention import attention
from fastdiff.kernels.linear import linear
from fastdiff.kernels.where import on_gpu
from fastdiff.models.blocks import Columns, require, split_heads
from fastdiff.models.borrow import Loan, Unsupported, Weights
from fastdiff.models.joint import JointBlock, Modulated, borrow_mlp, borrow_modulated
from fastdiff.models.joint_attention import (
    HeadNorms,
    JointAttention,
    TextAttention,
    borrow_head_norms,
)
from fastdiff.models.reads import Reader
from fastdiff.models.rotary import Turns
from fastdiff.models.stream import Stream
from fastdiff.models.watch import kind

PROCESSOR, IP_PROCESSOR = "FluxAttnProcessor", "FluxIPAdapterAttnProcessor"
Single = Callable[[Stream, Tensor, Turns], Stream]
"""A block of one stream, its vectors [B, all] and what turns its tokens -> the stream after it."""


def both(seen: Tensor, up: Tensor, out: Weights) -> Tensor:
    """out([seen, up]) without the concatenation: two products into one memory."""
    own, other = out.weight.tensor_split((seen.shape[-1],), 1)
    made = linear(seen, own, out.bias)
    if not on_gpu(made):
        return linear(up, other, residual=made)
    made.flatten(0, 1).addmm_(up.flatten(0, 1), other.t())
    return made


@dataclass(frozen=True)
class SingleBlock:
    """Attention and MLP of the same norm, added together."""

    norm: Modulated
    heads: int
    qkv: Weights
    norms: HeadNorms
    up: Weights
    out: Weights
    """[D, D + 4·D]: of the attention's columns, then of the MLP's."""

    def __call__(self, x: Stream, row: Tensor, turns: Turns) -> Stream:
        shift, scale, gate = self.norm.vectors(row)
        h = x.normed(self.norm.eps, shift, scale)
        q, k, v = split_heads(linear(h, self.qkv.weight, self.qkv.bias), 3, self.heads)
        seen = attention(*self.norms(q, k, turns), v).flatten(2)
        up = linear(h, self.up.weight, self.up.bias, act="gelu_tanh")
        return Stream(both(seen, up, self.out), gate, x.closed())


def borrow_flux_block(
    module: Any, loan: Loan, rows: Columns, width: int, *processors: str
) -> JointBlock:
    """From a FluxTransformerBlock; `rows` assigns columns of the packed modulations. `processors`:
    as for `open_flux_attention`."""
    block, zero = loan.open(module, "FluxTransformerBlock"), "AdaLayerNormZero"
    return JointBlock(
        norm=borrow_modulated(block.norm1, loan, rows, width, zero),
        attention=borrow_joint(
            open_flux_attention(block.attn, loan, "FluxAttention", *processors), loan, width
        ),
        own=None,
        mlp=borrow_mlp(block.norm2, block.ff, loan, width),
        text_norm=borrow_modulated(block.norm1_context, loan, rows, width, zero),
        text_mlp=borrow_mlp(block.norm2_context, block.ff_context, loan, width),
    )


def borrow_joint(own: Reader, loan: Loan, width: int) -> JointAttention:
    """From the attention of a block of two streams."""
    require(own.added_kv_proj_dim is not None, "attention without a text in a block of two streams")
    out, dropout = loan.each(own.to_out, 2)
    loan.inert(dropout)
    return JointAttention(
        heads=width // own.head_dim,
        qkv=loan.linear(own.to_q, own.to_k, own.to_v),
        norms=borrow_head_norms(own.norm_q, own.norm_k, loan),
        out=loan.linear(out),
        text=TextAttention(
            loan.linear(own.add_q_proj, own.add_k_proj, own.add_v_proj),
            borrow_head_norms(own.norm_added_q, own.norm_added_k, loan),
            loan.linear(own.to_add_out),
        ),
        image_norms=None,
    )


def borrow_single_block(module: Any, loan: Loan, rows: Columns, width: int) -> SingleBlock:
    """From a FluxSingleTransformerBlock; `rows` assigns columns of the packed modulations."""
    block = loan.open(module, "FluxSingleTransformerBlock")
    own = open_flux_attention(block.attn, loan)
    require(own.added_kv_proj_dim is None, "attention to a text in a block of one stream")
    by = loan.open(block.act_mlp, nn.GELU).approximate
    require(by == "tanh", f"a GELU of kind {by!r}")
    return SingleBlock(
        norm=borrow_modulated(block.norm, loan, rows, width, "AdaLayerNormZeroSingle"),
        heads=width // own.head_dim,
        qkv=loan.linear(own.to_q, own.to_k, own.to_v),
        norms=borrow_norms(own, loan),
        up=loan.linear(block.proj_mlp),
        out=loan.linear(block.proj_out),
    )


def borrow_norms(own: Reader, loan: Loan) -> HeadNorms:
    """The head norms of the attention in a block of one stream."""
    norms = borrow_head_norms(own.norm_q, own.norm_k, loan)
    if norms is None:
        raise Unsupported("queries and keys that are not normalised")
    return norms


def open_flux_attention(
    module: Any, loan: Loan, name: str = "FluxAttention", *processors: str
) -> Reader:
    """Read an attention of the class `name` with a processor of one of these classes, by default
    the plain one."""
    own, known = loan.open(module, name), processors or (PROCESSOR,)
    held = loan.open(own.processor, next((p for p in known if kind(own.processor) == p), known[0]))
    require(held._attention_backend is None, "an attention backend that was set")
    require(held._parallel_config is None, "attention in parallel over devices")
    require(not own.fused_projections, "fused projections")
    return own  # type: ignore[no-any-return]
