"""What a U-Net computes from its conditions before the loop: the embedding of a text or picture,
as the tokens that it attends to and as a part of the time embedding. On borrowed weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.attention import attention
from fastdiff.kernels.linear import linear
from fastdiff.models.blocks import require
from fastdiff.models.borrow import Loan, Norm, Weights
from fastdiff.models.sums import Sum

Told = Iterator[tuple[str, int, int]]
TextNorms = tuple[tuple[slice, Norm], ...]
"""Columns of attentions among all attentions' keys and values, and each one's norm of the text."""


@dataclass(frozen=True)
class Projection:
    """A linear layer, and a LayerNorm after it unless None."""

    linear: Weights
    norm: Norm | None

    @property
    def width(self) -> int:
        """The columns it takes."""
        return self.linear.weight.shape[1]

    def __call__(self, x: Tensor, tokens: int = 0) -> Tensor:
        """[..., width] -> [..., D], or [..., tokens, D] of as many columns each."""
        h = linear(x.contiguous(), self.linear.weight, self.linear.bias)
        h = h.unflatten(-1, (tokens, -1)) if tokens else h
        if self.norm is None:
            return h
        return Sum(h.view(len(h), -1, h.shape[-1])).layer_normed(self.norm).view(h.shape)


@dataclass(frozen=True)
class Tokens:
    """The tokens that a U-Net attends to: of a text (DeepFloyd IF), of a picture's embedding
    (Kandinsky 2.2), or of both, the picture's first (Kandinsky 2.1)."""

    text: Projection | None
    picture: Projection | None
    count: int
    """Tokens of a picture."""

    def __call__(self, text: Tensor | None, picture: Tensor | None) -> Tensor:
        """text [B, T, D], picture [B, D'] -> [B, tokens, D'']."""
        parts = []
        if self.picture is not None and picture is not None:
            parts.append(self.picture(picture, self.count))
        if self.text is not None and text is not None:
            parts.append(self.text(text))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@dataclass(frozen=True)
class Pooling:
    """Attention of a text's mean to all its tokens, as in DeepFloyd IF: one vector for a text."""

    norm: Norm
    mean: Tensor
    """[1, D] added to the mean."""
    heads: int
    q: Weights
    kv: Weights

    def __call__(self, text: Tensor) -> Tensor:
        """[B, T, D] -> [B, D]"""
        text = Sum(text.contiguous()).layer_normed(self.norm)
        token = text.mean(1, keepdim=True) + self.mean
        text = torch.cat([token, text], 1)
        q = linear(token, self.q.weight, self.q.bias).unflatten(-1, (self.heads, -1))
        kv = linear(text, self.kv.weight, self.kv.bias).unflatten(-1, (2, self.heads, -1))
        return attention(q, *kv.unbind(2)).flatten(1)


@dataclass(frozen=True)
class Summary:
    """What a U-Net adds to its time embedding: a projection of a text (DeepFloyd IF), of a
    picture's embedding (Kandinsky 2.2), or of both (Kandinsky 2.1)."""

    pooling: Pooling | None
    """None if texts are vectors already."""
    text: Projection | None
    picture: Projection | None

    def __call__(self, text: Tensor | None, picture: Tensor | None) -> list[Tensor]:
        """text [B, T, D] or [B, D], picture [B, D'] -> [B, D''], one or two to add."""
        parts = []
        if self.text is not None and text is not None:
            parts.append(self.text(text if self.pooling is None else self.pooling(text)))
        if self.picture is not None and picture is not None:
            parts.append(self.picture(picture))
        return parts


def told(text: Weights | None, tokens: Tokens | None, summary: Summary | None) -> Told:
    """Which conditions of texts and pictures a U-Net reads: name, columns, dimensions.

    text: its keys and values.
    """
    if text is not None and tokens is None:
        yield "encoder_hidden_states", text.weight.shape[1], 3
    if tokens is not None and tokens.text is not None:
        yield "encoder_hidden_states", tokens.text.width, 3
    if summary is not None and summary.pooling is not None:
        yield "encoder_hidden_states", summary.pooling.q.weight.shape[1], 3
    elif summary is not None and summary.text is not None:
        yield "text_embeds", summary.text.width, 2
    for part in (tokens, summary):
        if part is not None and part.picture is not None:
            yield "image_embeds", part.picture.width, 2


def keys_and_values(text: Tensor, weights: Weights, norms: TextNorms) -> Tensor:
    """The text [B, T, D] as keys and values of every attention: [B, T, all their columns].

    norms: of attentions that normalise the text first, all or none of them.
    """
    if not norms:
        return linear(text, weights.weight, weights.bias)
    rows, bias, picture = [], weights.bias, Sum(text[:, :, None].contiguous())
    for columns, norm in norms:
        normed = picture.group_normed(norm, "none")[:, :, 0]
        own = None if bias is None else bias[columns]
        rows.append(linear(normed, weights.weight[columns], own))
    return torch.cat(rows, -1)


def borrow_tokens(module: Any, told: Any, loan: Loan) -> Tokens:
    """From a U-Net's `encoder_hid_proj`; told: its `encoder_hid_dim_type`."""
    if told == "text_proj":
        return Tokens(Projection(loan.linear(module), None), None, 0)
    if told == "image_proj":
        image = loan.open(module, "ImageProjection")
        picture = Projection(loan.linear(image.image_embeds), loan.norm(image.norm))
        return Tokens(None, picture, image.num_image_text_embeds)
    require(told == "text_image_proj", f"a projection of the text (encoder_hid_dim_type {told!r})")
    both = loan.open(module, "TextImageProjection")
    return Tokens(
        text=Projection(loan.linear(both.text_proj), None),
        picture=Projection(loan.linear(both.image_embeds), None),
        count=both.num_image_text_embeds,
    )


def borrow_summary(module: Any, told: Any, loan: Loan) -> Summary:
    """From a U-Net's `add_embedding`; told: its `addition_embed_type`."""
    if told == "text":
        text = loan.open(module, "TextTimeEmbedding")
        projection = Projection(loan.linear(text.proj), loan.norm(text.norm2))
        return Summary(_borrow_pooling(text.norm1, text.pool, loan), projection, None)
    if told == "image":
        image = loan.open(module, "ImageTimeEmbedding")
        norm = loan.norm(image.image_norm)
        return Summary(None, None, Projection(loan.linear(image.image_proj), norm))
    require(told == "text_image", f"addition_embed_type {told!r}")
    both = loan.open(module, "TextImageTimeEmbedding")
    return Summary(
        pooling=None,
        text=Projection(loan.linear(both.text_proj), loan.norm(both.text_norm)),
        picture=Projection(loan.linear(both.image_proj), None),
    )


def _borrow_pooling(norm: Any, module: Any, loan: Loan) -> Pooling:
    pool = loan.open(module, "AttentionPooling")
    width = loan.width(pool.q_proj)
    fits = pool.num_heads * pool.dim_per_head == width
    require(fits, f"{pool.num_heads} heads of {pool.dim_per_head} columns for {width}")
    return Pooling(
        norm=loan.norm(norm),
        mean=loan.parameter(pool.positional_embedding),
        heads=pool.num_heads,
        q=loan.linear(pool.q_proj),
        kv=loan.linear(pool.k_proj, pool.v_proj),
    )
