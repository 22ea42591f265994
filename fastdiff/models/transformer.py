"""The transformers between a U-Net's resnets, on borrowed weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastdiff.kernels.attention import attention
from fastdiff.kernels.layer_norm import layer_norm
from fastdiff.kernels.linear import linear
from fastdiff.models.blocks import (
    PLAIN_PROCESSORS,
    Columns,
    check_attention,
    expect,
    group_norm,
    repeated,
    require,
)
from fastdiff.models.borrow import Loan, Norm, Weights
from fastdiff.models.ip_adapter import PROCESSOR


class CrossColumns(Columns):
    """Columns of the text's keys and values, and the cross-attentions that they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions: list[Any] = []

    def take_cross(self, attention: Any) -> slice:
        self.attentions.append(attention)
        return self.take(attention.to_k, attention.to_v)


@dataclass(frozen=True)
class Block:
    """Self-attention, cross-attention, GEGLU; each behind a LayerNorm and around a residual."""

    heads: int
    norm1: Norm
    qkv: Weights
    out1: Weights
    norm2: Norm
    q: Weights
    text: slice
    """This block's columns (K, then V) of the projected text, or pictures, of all blocks."""
    out2: Weights
    norm3: Norm
    geglu: Weights
    ff: Weights

    def __call__(
        self, x: Tensor, text: Tensor, images: Sequence[Tensor], mask: Tensor | None
    ) -> Tensor:
        """x [B, L, C], text [B or 2B, T, …]: pictures part where they meet different texts.

        `images` [B or 2B as the text, tokens, …]: what IP-Adapters add to the text's attention.
        """
        split = (-1, (self.heads, x.shape[-1] // self.heads))
        h = _layer_norm(x, self.norm1)
        q, k, v = (
            part.unflatten(*split)
            for part in linear(h, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        )
        h = attention(q, k, v).flatten(2)
        x = linear(h, self.out1.weight, self.out1.bias, residual=x)
        h = _layer_norm(x, self.norm2)
        q = linear(h, self.q.weight, self.q.bias).unflatten(*split)
        # attention reads any strides; what follows takes x as the residual of both halves
        q = q.expand(text.shape[0], -1, -1, -1) if q.shape[0] == 1 else repeated(q, text.shape[0])
        k, v = (part.unflatten(*split) for part in text[..., self.text].chunk(2, -1))
        h = attention(q, k, v, mask).flatten(2)
        x = linear(h, self.out2.weight, self.out2.bias, residual=x)
        for image in images:
            if image.shape[1] > 0:
                k, v = (part.unflatten(*split) for part in image[..., self.text].chunk(2, -1))
                x = linear(attention(q, k, v).flatten(2), self.out2.weight, residual=x)
        h = _layer_norm(x, self.norm3)
        h = linear(h, self.geglu.weight, self.geglu.bias, act="geglu")
        return linear(h, self.ff.weight, self.ff.bias, residual=x)


def _layer_norm(x: Tensor, norm: Norm) -> Tensor:
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def borrow_block(module: Any, loan: Loan, text: CrossColumns) -> Block:
    """From a BasicTransformerBlock."""
    expect(module, "BasicTransformerBlock")
    require(module.norm_type == "layer_norm", f"transformer norms of type {module.norm_type}")
    require(module.attn2 is not None, "a transformer block without cross-attention")
    require(not module.only_cross_attention, "cross-attention in place of self-attention")
    require(module.pos_embed is None, "positional embeddings in a transformer block")
    require(getattr(module, "fuser", None) is None, "a gated (GLIGEN) transformer block")
    expect(module.ff.net[0], "GEGLU")
    own, cross = module.attn1, module.attn2
    check_attention(own)
    check_attention(cross, *PLAIN_PROCESSORS, PROCESSOR)
    for part in (own, cross):
        require(part.group_norm is None, "a group norm inside a transformer block's attention")
    require(own.heads == cross.heads, "self- and cross-attention with different heads")
    return Block(
        heads=own.heads,
        norm1=loan.norm(module.norm1),
        qkv=loan.linear(own.to_q, own.to_k, own.to_v),
        out1=loan.linear(own.to_out[0]),
        norm2=loan.norm(module.norm2),
        q=loan.linear(cross.to_q),
        text=text.take_cross(cross),
        out2=loan.linear(cross.to_out[0]),
        norm3=loan.norm(module.norm3),
        geglu=loan.linear(module.ff.net[0].proj),
        ff=loan.linear(module.ff.net[2]),
    )


@dataclass(frozen=True)
class Transformer:
    norm: Norm
    proj_in: Weights
    blocks: tuple[Block, ...]
    proj_out: Weights

    def __call__(
        self, x: Tensor, text: Tensor, images: Sequence[Tensor], mask: Tensor | None
    ) -> Tensor:
        h = group_norm(x, self.norm, silu=False).flatten(1, 2)
        h = linear(h, self.proj_in.weight, self.proj_in.bias)
        for block in self.blocks:
            h = block(h, text, images, mask)
        h = h.unflatten(1, x.shape[1:3])
        return linear(h, self.proj_out.weight, self.proj_out.bias, residual=x)


def borrow_transformer(module: Any, loan: Loan, text: CrossColumns) -> Transformer:
    """From a Transformer2DModel over pictures, its projections linear or 1×1 convolutions."""
    expect(module, "Transformer2DModel")
    require(module.is_input_continuous, "a transformer over patches or codes")
    return Transformer(
        norm=loan.norm(module.norm),
        proj_in=loan.linear(module.proj_in),
        blocks=tuple(borrow_block(block, loan, text) for block in module.transformer_blocks),
        proj_out=loan.linear(module.proj_out),
    )
