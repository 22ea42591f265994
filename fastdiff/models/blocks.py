"""The blocks of Stable Diffusion's U-Nets and autoencoders, on borrowed weights.

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
from fastdiff.kernels.where import on_gpu
from fastdiff.models.borrow import Loan, Norm, Unsupported, Weights
from fastdiff.models.reads import Reader
from fastdiff.models.sums import Sum, convolved, projected
from fastdiff.models.watch import kind

PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")


def require(condition: bool, what: str) -> None:
    """Raise Unsupported(what) unless the condition holds."""
    if not condition:
        raise Unsupported(what)


@dataclass(frozen=True)
class Resnet:
    norm1: Norm
    conv1: Weights
    norm2: Norm
    conv2: Weights
    shortcut: Weights | None
    row: slice | None
    """The columns of this block in the projected time embeddings of all blocks."""

    def __call__(self, x: Sum, rows: Tensor | None, beside: Tensor | None = None) -> Sum:
        """x with the channels of `beside`, a skip connection, appended. `beside` may have half as
        many pictures, if both halves of guidance share it."""
        row = None
        if rows is not None and self.row is not None:
            row = rows[:, self.row].expand(x.batch, -1)
        if beside is not None and not on_gpu(beside):  # our CPU kernels take one tensor
            x, beside = Sum(concat(x.closed(), beside)), None
        h = x.group_normed(self.norm1, silu=True, beside=beside)
        h = convolved(h, self.conv1).group_normed(self.norm2, silu=True, row=row)
        return convolved(h, self.conv2, self.around(x.closed(), beside))

    def around(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """The residual: the channels of x and `beside`, or their shortcut."""
        if self.shortcut is None:
            return x
        weight, channels = self.shortcut.weight, x.shape[-1]
        y = linear(x, weight[:, :channels], self.shortcut.bias)
        if beside is not None:  # a sum of two products, so no concatenation is needed
            pixels = beside.numel() // beside.shape[-1]
            for part in y.view(-1, pixels, y.shape[-1]):
                part.addmm_(beside.view(pixels, -1), weight[:, channels:].t())
        return y


def borrow_resnet(module: Any, loan: Loan, rows: "Columns | None" = None) -> Resnet:
    """From a ResnetBlock2D; `rows` assigns columns of the packed time-embedding projection."""
    resnet = loan.open(module, "ResnetBlock2D")
    projected, shortcut = resnet.time_emb_proj is not None, resnet.conv_shortcut
    require(
        resnet.time_embedding_norm == "default"
        or (resnet.time_embedding_norm == "group" and not projected),
        f"time embeddings of kind {resnet.time_embedding_norm!r}",
    )
    require(resnet.upsample is None and resnet.downsample is None, "resampling inside a resnet")
    require(resnet.output_scale_factor == 1.0, "an output_scale_factor other than 1")
    require(not resnet.skip_time_act, "time embeddings without activation")
    require(projected == (rows is not None), "a resnet with a missing or unexpected time embedding")
    loan.silu(resnet.nonlinearity)
    loan.inert(resnet.dropout)
    conv1, conv2 = loan.conv(resnet.conv1), loan.conv(resnet.conv2)
    same = conv1.weight.shape[1] == conv2.weight.shape[0]
    require(same or shortcut is not None, "a resnet that changes its channels without a shortcut")
    return Resnet(
        norm1=loan.norm(resnet.norm1),
        conv1=conv1,
        norm2=loan.norm(resnet.norm2),
        conv2=conv2,
        shortcut=None if shortcut is None else loan.linear(shortcut),
        row=None if rows is None else rows.take(resnet.time_emb_proj),
    )


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
    module: Any, loan: Loan, residual: bool, processors: tuple[str, ...] = PLAIN_PROCESSORS
) -> tuple[Reader, Any]:
    """Read a plain Attention; also returns the last layer of its output.

    Raises Unsupported unless it has one of the `processors`, and a residual connection just if
    `residual`.
    """
    attention = loan.open(module, "Attention")
    processor = kind(attention.processor)
    require(processor in processors, f"the attention processor {processor}")
    loan.open(attention.processor, processor)
    require(attention.spatial_norm is None, "spatial norms in attention")
    require(attention.norm_q is None and attention.norm_k is None, "normalised queries or keys")
    require(not attention.norm_cross, "normalised text in cross-attention")
    require(attention.rescale_output_factor == 1.0, "a rescale_output_factor other than 1")
    require(
        attention.residual_connection == residual, "attention with a missing or unexpected residual"
    )
    width = loan.width(attention.to_q)
    require(width % attention.heads == 0, f"{attention.heads} heads of {width} columns")
    if processor == "AttnProcessor":  # it scales by itself, and has a dtype for its sums
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
    norm: Norm
    qkv: Weights
    out: Weights

    def __call__(self, x: Sum, *_told: object) -> Sum:
        """`_told`: the text and masks that a transformer in its place would take."""
        h = linear(x.group_normed(self.norm, silu=False), self.qkv.weight, self.qkv.bias)
        around = x.closed()
        split = (-1, (self.heads, h.shape[-1] // 3 // self.heads))
        q, k, v = (part.unflatten(*split) for part in h.flatten(1, 2).chunk(3, -1))
        return projected(attention(q, k, v).reshape(*around.shape[:-1], -1), self.out, around)


def borrow_picture_attention(module: Any, loan: Loan) -> PictureAttention:
    """From an Attention with a GroupNorm and a residual connection."""
    attention, out = open_attention(module, loan, residual=True)
    return PictureAttention(
        heads=attention.heads,
        norm=loan.norm(attention.group_norm),
        qkv=loan.linear(attention.to_q, attention.to_k, attention.to_v),
        out=loan.linear(out),
    )


@dataclass(frozen=True)
class Down:
    """Halve the picture: a convolution of stride 2, padded on all sides or only at the end."""

    conv: Weights
    padding: tuple[int, int]

    def __call__(self, x: Sum) -> Sum:
        return convolved(x.closed(), self.conv, stride=2, padding=self.padding)


@dataclass(frozen=True)
class Up:
    """Enlarge the picture to `size` (by default twice its size), then convolve."""

    conv: Weights

    def __call__(self, x: Sum, size: tuple[int, int] | None = None) -> Sum:
        twice = x.twice
        size = twice if size is None else size
        if size == twice and x.waits:
            return convolved(x.enlarged(), self.conv)
        return convolved(x.closed(), self.conv, size=size)


def borrow_down(module: Any, loan: Loan) -> Down:
    """From a Downsample2D."""
    down = loan.open(module, "Downsample2D")
    require(down.use_conv and down.norm is None, "downsampling without a plain convolution")
    require(down.padding in (0, 1), f"downsampling padded by {down.padding}")
    weights = loan.conv(down.conv, stride=2, padding=down.padding)
    require(down.channels == weights.weight.shape[1], f"downsampling of {down.channels} channels")
    return Down(weights, (1, 1) if down.padding else (0, 1))


def borrow_up(module: Any, loan: Loan) -> Up:
    """From an Upsample2D."""
    up = loan.open(module, "Upsample2D")
    require(
        up.use_conv and not up.use_conv_transpose and up.interpolate and up.norm is None,
        "upsampling without a plain convolution",
    )
    weights = loan.conv(up.conv if up.name == "conv" else up.Conv2d_0)
    require(up.channels == weights.weight.shape[1], f"upsampling of {up.channels} channels")
    return Up(weights)


def borrow_resamplers(block: Reader, loan: Loan) -> tuple[Down | None, Up | None]:
    """From a block's downsamplers and upsamplers, at most one of each."""
    found = (getattr(block, name, None) for name in ("downsamplers", "upsamplers"))
    downs, ups = ([] if modules is None else loan.each(modules) for modules in found)
    require(len(downs) <= 1 and len(ups) <= 1, "several resamplers in a row")
    return (
        borrow_down(downs[0], loan) if downs else None,
        borrow_up(ups[0], loan) if ups else None,
    )


def repeated(x: Tensor, batch: int) -> Tensor:
    """x [B, ...] for a batch of B (unchanged) or 2B (repeated for each half of guidance)."""
    if x.shape[0] == batch:
        return x
    row = x.reshape(1, -1)
    return concat(row, row).view(batch, *x.shape[1:])


def channels_last(x: Tensor) -> Tensor:
    """[B, C, Y, X] -> contiguous [B, Y, X, C]."""
    return x.permute(0, 2, 3, 1).contiguous()


def channels_first(x: Tensor) -> Tensor:
    """[B, Y, X, C] -> contiguous [B, C, Y, X], as diffusers expects it."""
    return x.permute(0, 3, 1, 2).contiguous(memory_format=torch.contiguous_format)
