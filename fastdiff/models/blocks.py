"""The blocks that Stable Diffusion's U-Nets and autoencoders are made of, on borrowed weights.

Pictures are channels-last tensors [B, Y, X, C]. A block is a frozen dataclass of weights, a
`borrow_*` function that takes them from the diffusers module of the same structure (told by its
attributes, so that diffusers need not be imported here) and a function that runs it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.kernels.attention import attention
from fastdiff.kernels.concat import concat
from fastdiff.kernels.contract import on_gpu
from fastdiff.kernels.linear import linear
from fastdiff.models.borrow import Loan, Norm, Unsupported, Weights, kind
from fastdiff.models.sums import Sum, convolved, projected

PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")


def require(condition: bool, what: str) -> None:
    """Raise Unsupported(what) unless the condition holds."""
    if not condition:
        raise Unsupported(what)


def expect(module: Any, *names: str) -> None:
    """Raise Unsupported unless the module is one of diffusers' own classes of these names."""
    require(kind(module) in names, f"a {kind(module)} where a {' or '.join(names)} was expected")


@dataclass(frozen=True)
class Resnet:
    norm1: Norm
    conv1: Weights
    norm2: Norm
    conv2: Weights
    shortcut: Weights | None
    row: slice | None
    """This block's columns of the projected time embedding of all blocks."""

    def __call__(self, x: Sum, rows: Tensor | None, beside: Tensor | None = None) -> Sum:
        """Of x, and of the channels of `beside` after x's: a skip connection, which may be of half
        as many pictures where the halves of guidance share it."""
        row = None
        if rows is not None and self.row is not None:
            row = rows[:, self.row].expand(x.batch, -1)
        if beside is not None and not on_gpu(beside):  # our CPU loops want one tensor
            x, beside = Sum(concat(x.closed(), beside)), None
        h = x.group_normed(self.norm1, silu=True, beside=beside)
        h = convolved(h, self.conv1).group_normed(self.norm2, silu=True, row=row)
        return convolved(h, self.conv2, self._around(x.closed(), beside))

    def _around(self, x: Tensor, beside: Tensor | None) -> Tensor:
        if self.shortcut is None:
            return x
        weight, channels = self.shortcut.weight, x.shape[-1]
        y = linear(x, weight[:, :channels], self.shortcut.bias)
        if beside is not None:  # the product is as a sum of two, so nobody concatenates
            pixels = beside.numel() // beside.shape[-1]
            for part in y.view(-1, pixels, y.shape[-1]):
                part.addmm_(beside.view(pixels, -1), weight[:, channels:].t())
        return y


def borrow_resnet(module: Any, loan: Loan, rows: "Columns | None" = None) -> Resnet:
    """From a ResnetBlock2D; `rows` hands out columns of the packed time-embedding projection."""
    expect(module, "ResnetBlock2D")
    require(module.time_embedding_norm in ("default", "group"), "scale-and-shift time embeddings")
    require(module.upsample is None and module.downsample is None, "resampling inside a resnet")
    require(module.output_scale_factor == 1.0, "an output_scale_factor other than 1")
    require(not module.skip_time_act, "time embeddings without activation")
    require(type(module.nonlinearity) is nn.SiLU, "an activation other than SiLU")
    projected = module.time_emb_proj is not None
    require(not projected or rows is not None, "a time embedding where none is given")
    return Resnet(
        norm1=loan.norm(module.norm1),
        conv1=loan.conv(module.conv1),
        norm2=loan.norm(module.norm2),
        conv2=loan.conv(module.conv2),
        shortcut=None if module.conv_shortcut is None else loan.linear(module.conv_shortcut),
        row=rows.take(module.time_emb_proj) if rows is not None and projected else None,
    )


class Columns:
    """Collects linear layers that read the same input, to be run as one matrix product."""

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self._width = 0

    def take(self, *layers: Any) -> slice:
        start = self._width
        self.layers += layers
        self._width += sum(layer.weight.shape[0] for layer in layers)
        return slice(start, self._width)


def check_attention(module: Any, *processors: str) -> None:
    """Raise Unsupported unless it is a plain Attention with one of the `processors`."""
    processor = kind(module.processor)
    require(processor in (processors or PLAIN_PROCESSORS), f"the attention processor {processor}")
    require(module.spatial_norm is None, "spatial norms in attention")
    require(module.norm_q is None and module.norm_k is None, "normalised queries and keys")
    require(not module.norm_cross, "normalised text in cross-attention")
    require(module.rescale_output_factor == 1.0, "a rescale_output_factor other than 1")


@dataclass(frozen=True)
class PictureAttention:
    """The autoencoder's self-attention over all pixels."""

    heads: int
    norm: Norm
    qkv: Weights
    out: Weights

    def __call__(self, x: Sum) -> Sum:
        h = linear(x.group_normed(self.norm, silu=False), self.qkv.weight, self.qkv.bias)
        around = x.closed()
        split = (-1, (self.heads, around.shape[-1] // self.heads))
        q, k, v = (part.unflatten(*split) for part in h.flatten(1, 2).chunk(3, -1))
        return projected(attention(q, k, v).reshape(around.shape), self.out, around)


def borrow_picture_attention(module: Any, loan: Loan) -> PictureAttention:
    """From an Attention with a GroupNorm and a residual connection."""
    check_attention(module)
    require(module.residual_connection, "picture attention without its residual")
    return PictureAttention(
        heads=module.heads,
        norm=loan.norm(module.group_norm),
        qkv=loan.linear(module.to_q, module.to_k, module.to_v),
        out=loan.linear(module.to_out[0]),
    )


@dataclass(frozen=True)
class Down:
    """Halve the picture: a convolution of stride 2, padded on all sides or only after."""

    conv: Weights
    padding: tuple[int, int]

    def __call__(self, x: Sum) -> Sum:
        return convolved(x.closed(), self.conv, stride=2, padding=self.padding)


@dataclass(frozen=True)
class Up:
    """Enlarge the picture to `size` (twice its own by default), then convolve."""

    conv: Weights

    def __call__(self, x: Sum, size: tuple[int, int] | None = None) -> Sum:
        twice = x.twice
        size = twice if size is None else size
        if size == twice and x.waits:
            return convolved(x.enlarged(), self.conv)
        return convolved(x.closed(), self.conv, size=size)


def borrow_down(module: Any, loan: Loan) -> Down:
    expect(module, "Downsample2D")
    require(module.use_conv and module.norm is None, "downsampling without a plain convolution")
    require(module.padding in (0, 1), f"downsampling padded by {module.padding}")
    weights = loan.conv(module.conv, stride=2, padding=module.padding)
    return Down(weights, (1, 1) if module.padding else (0, 1))


def borrow_up(module: Any, loan: Loan) -> Up:
    expect(module, "Upsample2D")
    require(
        module.use_conv
        and not module.use_conv_transpose
        and module.interpolate
        and module.norm is None,
        "upsampling without a plain convolution",
    )
    return Up(loan.conv(module.conv if module.name == "conv" else module.Conv2d_0))


def only(modules: Any) -> Any:
    """The single element of a module list, or None where there is none."""
    if modules is None or len(modules) == 0:
        return None
    require(len(modules) == 1, f"{len(modules)} resamplers in a row")
    return modules[0]


def repeated(x: Tensor, batch: int) -> Tensor:
    """x [B, ...] for a batch of B (as it is) or 2B (once for each half of guidance)."""
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
