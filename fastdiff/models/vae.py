"""The decoder and encoder of AutoencoderKL and VQModel, on borrowed weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.conv2d import conv2d
from fastdiff.kernels.observe import scope
from fastdiff.models.blocks import (
    PictureAttention,
    borrow_picture_attention,
    channels_first,
    channels_last,
    require,
)
from fastdiff.models.borrow import Loan, Norm, Weights
from fastdiff.models.resnets import Down, Resnet, Up, borrow_resamplers, borrow_resnet
from fastdiff.models.strips import Strips
from fastdiff.models.sums import Sum, convolved
from fastdiff.models.watch import kind


@dataclass(frozen=True)
class Stage:
    """Resnets, then a resampler (None at the finest level)."""

    resnets: tuple[Resnet, ...]
    resample: Down | Up | None

    def __call__(self, x: Sum) -> Sum:
        x = self.resolved(x)
        return x if self.resample is None else self.resample(x)

    def resolved(self, x: Sum) -> Sum:
        """The result of the resnets alone."""
        for resnet in self.resnets:
            x = resnet(x, None)
        return x

    @property
    def width(self) -> int:
        """Values that the resnets need at once per pixel: input and branch, each with its norm."""
        return max(2 * sum(resnet.conv1.weight.shape[:2]) for resnet in self.resnets)

    @property
    def enlarging(self) -> int:
        """Values that an upsampler needs per pixel: its input, enlarged and convolved."""
        return 0 if self.resample is None else 9 * self.resample.conv.weight.shape[0]


@dataclass(frozen=True)
class Middle:
    """A resnet, then pairs of attention (or None) and resnet."""

    first: Resnet
    pairs: tuple[tuple[PictureAttention | None, Resnet], ...]

    def __call__(self, x: Sum) -> Sum:
        x = self.first(x, None)
        for attention, resnet in self.pairs:
            x = resnet(x if attention is None else attention(x), None)
        return x


@dataclass(frozen=True)
class Decoder:
    """latents [B, C, Y, X] -> picture [B, 3, f·Y, f·X], after `post_quant_conv`."""

    conv_in: Weights
    mid: Middle
    stages: tuple[Stage, ...]
    norm_out: Norm
    conv_out: Weights

    def run(self, x: Tensor) -> Tensor:
        """The same, channels last throughout."""
        with scope("VAE conv in"):
            h = convolved(x, self.conv_in)
        with scope("VAE mid"):
            h = self.mid(h)
        for i, stage in enumerate(self.stages):
            with scope(f"VAE up {i}"):
                h = stage(h)
        with scope("VAE out"):
            return _finish(h, self.norm_out, self.conv_out)

    def __call__(self, sample: Tensor) -> Tensor:
        return channels_first(self.run(channels_last(sample)))

    def bytes(self, x: Tensor) -> int:
        """The most bytes that intermediate pictures take at once in `run`, per latent of x [B, Y,
        X, C]."""
        _, rows, columns, _ = x.shape
        most = 0
        for stage in self.stages:
            row = max(stage.width, stage.enlarging) * x.element_size() * columns
            most = max(most, rows * row)
            rows, columns = 2 * rows, 2 * columns
        return most

    def run_in_strips(self, x: Tensor, bytes: int) -> Tensor:
        """Run one picture after another, in strips if one would take more than `bytes`.

        Args:
            x: [B, Y, X, C], contiguous.
            bytes: what intermediate pictures may take at once, besides weights and result; the
                largest one of the last level is always kept whole.

        Returns:
            [B, f·Y, f·X, 3], contiguous.
        """
        pictures = [self._in_strips(one, bytes) for one in x.split(1)]
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)

    def _in_strips(self, x: Tensor, bytes: int) -> Tensor:
        with scope("VAE conv in"):
            h: Any = convolved(x, self.conv_in)
        with scope("VAE mid"):
            h = self.mid(h)
        strips = Strips(bytes)
        _, rows, columns, _ = x.shape
        for i, stage in enumerate(self.stages):
            with scope(f"VAE up {i}"):
                row = stage.width * x.element_size() * columns
                if isinstance(h, Sum) and rows * row <= bytes:
                    h = stage.resolved(h)
                else:
                    h = strips.held(h, row)
                    for resnet in stage.resnets:
                        h = strips.resnet(h, resnet, row)
                if not isinstance(stage.resample, Up):
                    break
                row = stage.enlarging * x.element_size() * columns
                if isinstance(h, Sum) and rows * row <= bytes:
                    h = stage.resample(h)
                else:
                    h = strips.enlarged(strips.held(h, row), stage.resample, row // 2)
                rows, columns = 2 * rows, 2 * columns
        with scope("VAE out"):
            if isinstance(h, Sum):
                return _finish(h, self.norm_out, self.conv_out)
            return strips.finish(h, self.norm_out, self.conv_out)


@dataclass(frozen=True)
class Encoder:
    """picture [B, 3, Y, X] -> moments [B, 2C, Y/f, X/f], before `quant_conv`."""

    conv_in: Weights
    stages: tuple[Stage, ...]
    mid: Middle
    norm_out: Norm
    conv_out: Weights

    def run(self, x: Tensor) -> Tensor:
        """The same, channels last throughout."""
        h = convolved(x, self.conv_in)
        for stage in self.stages:
            h = stage(h)
        return _finish(self.mid(h), self.norm_out, self.conv_out)

    def __call__(self, sample: Tensor) -> Tensor:
        return channels_first(self.run(channels_last(sample)))


def borrow_decoder(module: Any, loan: Loan) -> Decoder:
    """Borrow an autoencoder's decoder's weights; raises Unsupported for other structures."""
    net = loan.open(module, "Decoder")
    require(kind(net.conv_norm_out) != "SpatialNorm", "norms that read the latents (SpatialNorm)")
    loan.silu(net.conv_act)
    blocks = loan.each(net.up_blocks)
    decoder = Decoder(
        conv_in=loan.conv(net.conv_in),
        mid=_middle(net.mid_block, loan),
        stages=tuple(_stage(block, "UpDecoderBlock2D", loan) for block in blocks),
        norm_out=loan.norm(net.conv_norm_out),
        conv_out=loan.conv(net.conv_out),
    )
    loan.seal()
    return decoder


def borrow_encoder(module: Any, loan: Loan) -> Encoder:
    """Borrow an autoencoder's encoder's weights; raises Unsupported for other structures."""
    net = loan.open(module, "Encoder")
    loan.silu(net.conv_act)
    blocks = loan.each(net.down_blocks)
    encoder = Encoder(
        conv_in=loan.conv(net.conv_in),
        stages=tuple(_stage(block, "DownEncoderBlock2D", loan) for block in blocks),
        mid=_middle(net.mid_block, loan),
        norm_out=loan.norm(net.conv_norm_out),
        conv_out=loan.conv(net.conv_out),
    )
    loan.seal()
    return encoder


def _finish(x: Sum, norm: Norm, conv: Weights) -> Tensor:
    return conv2d(x.group_normed(norm, "silu", last=True), conv.weight, conv.bias)


def _stage(module: Any, expected: str, loan: Loan) -> Stage:
    block = loan.open(module, expected)
    resnets = tuple(_resnet(resnet, loan) for resnet in loan.each(block.resnets))
    down, up = borrow_resamplers(block, loan)
    assert not isinstance(down, Resnet)
    assert not isinstance(up, Resnet)
    return Stage(resnets, down or up)


def _resnet(module: Any, loan: Loan) -> Resnet:
    """A resnet that can be computed in strips."""
    resnet = borrow_resnet(module, loan)
    require(resnet.act == "silu", "an activation other than SiLU")
    require(resnet.scale == 1.0, "an output_scale_factor other than 1")
    return resnet


def _middle(module: Any, loan: Loan) -> Middle:
    block = loan.open(module, "UNetMidBlock2D")
    resnets = [_resnet(resnet, loan) for resnet in loan.each(block.resnets)]
    attentions = [
        attention if attention is None else borrow_picture_attention(attention, loan)
        for attention in loan.each(block.attentions)
    ]
    return Middle(resnets[0], tuple(zip(attentions, resnets[1:], strict=True)))
