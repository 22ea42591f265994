"""What the blocks of U-Nets and autoencoders have in common, on borrowed weights; see `resnets`.

Pictures are channels-last tensors [B, Y, X, C]. A block is a frozen dataclass of weights, a
`borrow_*` function that takes them from the diffusers module of the same structure (checked by its
attributes, so diffusers need not be imported here), and a function that runs it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.attention import attention
from fastdiff.kernels.concat import concat
from fastdiff.kernels.linear import linear
from fastdiff.models.borrow import Loan, Norm, Unsupported, Weights
from fastdiff.models.reads import Reader
from fastdiff.models.sums import Sum, projected
from fastdiff.models.switches import Switch
from fastdiff.models.watch import kind

PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")
PERTURBING = {"PAGIdentitySelfAttnProcessor2_0": 2, "PAGCFGIdentitySelfAttnProcessor2_0": 3}
"""The processors of perturbed self-attention, and into how many parts they divide the batch."""


def require(condition: bool, what: str) -> None:
    """Raise Unsupported(what) unless the condition holds."""
    if not condition:
        raise Unsupported(what)


class Columns:
    """Collects linear layers with the same input, to run them as one matrix product."""

    def __init__(self, loan: Loan) -> None:
        self.layers: list[Any] = []
        self._loan, self._width = loan, 0

    def take(self, *layers: Any) -> slice:
        start = self._width
        self.layers += layers
        self._width += sum(map(self._loan.width, layers))
        return slice(start, self._width)


def open_attention(
    module: Any,
    loan: Loan,
    residual: bool,
    processors: tuple[str, ...] = PLAIN_PROCESSORS,
    text_norm: bool = False,
    switches: list[Switch] | None = None,
) -> tuple[Reader, Any]:
    """Read a plain Attention; also returns the last layer of its output.

    Raises Unsupported unless it has one of the `processors`, a residual connection just if
    `residual`, and no norm of the text unless the caller reads it (`text_norm`). `switches`: where
    its processor may be exchanged for a perturbing one, the list that gets its switch.
    """
    attention = loan.open(module, "Attention")
    if switches is None:
        processor = kind(attention.processor)
        require(processor in processors, f"the attention processor {processor}")
        loan.open(attention.processor, processor)
    else:
        processor = kind(module.processor)
        own = "AttnProcessor2_0" if processor in PERTURBING else processor
        require(own in processors, f"the attention processor {processor}")
        switches.append(loan.switch(module, "processor", own, *PERTURBING))
    require(attention.spatial_norm is None, "spatial norms in attention")
    require(attention.norm_q is None and attention.norm_k is None, "normalised queries or keys")
    require(text_norm or not attention.norm_cross, "normalised text in cross-attention")
    require(attention.rescale_output_factor == 1.0, "a rescale_output_factor other than 1")
    require(
        attention.residual_connection == residual, "attention with a missing or unexpected residual"
    )
    width = loan.width(attention.to_q)
    require(width % attention.heads == 0, f"{attention.heads} heads of {width} columns")
    if not processor.endswith("2_0"):  # it scales by itself, and has a dtype for its sums
        scaled = math.isclose(attention.scale, (attention.heads / width) ** 0.5)
        require(scaled, f"attention scaled by {attention.scale}")
        _ = attention.upcast_attention, attention.upcast_softmax  # ours always sums in float32
    out, dropout = loan.each(attention.to_out, 2)
    loan.inert(dropout)
    return attention, out


@dataclass(frozen=True)
class PictureAttention:
    """The autoencoder's self-attention over all pixels."""

    heads: int
    norm: Norm | None
    qkv: Weights
    out: Weights

    def __call__(self, x: Sum, *_told: object) -> Sum:
        """`_told`: the text and masks that a transformer in its place would take."""
        normal = x.closed() if self.norm is None else x.group_normed(self.norm, "none")
        h = linear(normal, self.qkv.weight, self.qkv.bias)
        around = x.closed()
        split = (-1, (self.heads, h.shape[-1] // 3 // self.heads))
        q, k, v = (part.unflatten(*split) for part in h.flatten(1, 2).chunk(3, -1))
        return projected(attention(q, k, v).reshape(*around.shape[:-1], -1), self.out, around)


def borrow_picture_attention(module: Any, loan: Loan) -> PictureAttention:
    """From an Attention with a residual connection, and a GroupNorm or none."""
    attention, out = open_attention(module, loan, residual=True)
    norm = attention.group_norm
    return PictureAttention(
        heads=attention.heads,
        norm=None if norm is None else loan.norm(norm),
        qkv=loan.linear(attention.to_q, attention.to_k, attention.to_v),
        out=loan.linear(out),
    )


def split_heads(packed: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[B, L, parts·D] -> [B, L, heads, D / heads] for each part, in the same memory."""
    split: Tensor = packed.unflatten(-1, (parts, heads, -1))
    return split.unbind(2)


def repeated(x: Tensor, batch: int) -> Tensor:
    """x [n, ...] for a larger batch: its last entries once more at the end, until there are enough.

    From B to 2B, these are the halves of guidance; from 2B to 3B, a perturbed part is added.
    """
    missing = min(batch - x.shape[0], x.shape[0])
    if missing == 0:
        return x
    more = concat(x.reshape(1, -1), x[-missing:].reshape(1, -1))
    return repeated(more.view(-1, *x.shape[1:]), batch)


def shared(x: Tensor, batch: int) -> Tensor:
    """x [n, ...], repeated for a batch unless the halves of it can share x."""
    return x if 2 * x.shape[0] == batch else repeated(x, batch)


def channels_last(x: Tensor) -> Tensor:
    """[B, C, Y, X] -> contiguous [B, Y, X, C]."""
    return x.permute(0, 2, 3, 1).contiguous()


def channels_first(x: Tensor) -> Tensor:
    """[B, Y, X, C] -> contiguous [B, C, Y, X], as diffusers expects it."""
    return x.permute(0, 3, 1, 2).contiguous(memory_format=torch.contiguous_format)
