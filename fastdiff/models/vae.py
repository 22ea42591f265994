"""Decoder and encoder of AutoencoderKL on borrowed weights."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastdiff.kernels.conv2d import conv2d
from fastdiff.kernels.observe import scope
from fastdiff.models.blocks import (
    Down,
    PictureAttention,
    Resnet,
    Up,
    borrow_down,
    borrow_picture_attention,
    borrow_resnet,
    borrow_up,
    channels_first,
    channels_last,
    expect,
    only,
    require,
)
from fastdiff.models.borrow import Loan, Norm, Weights
from fastdiff.models.sums import Sum, convolved


@dataclass(frozen=True)
class Stage:
    """Resnets, then a resampler (None at the finest level)."""

    resnets: tuple[Resnet, ...]
    resample: Down | Up | None

    def __call__(self, x: Sum) -> Sum:
        for resnet in self.resnets:
            x = resnet(x, None)
        return x if self.resample is None else self.resample(x)


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
    """Lend the weights of an AutoencoderKL's decoder; raises Unsupported for other structures."""
    _check(module)
    return Decoder(
        conv_in=loan.conv(module.conv_in),
        mid=_middle(module.mid_block, loan),
        stages=tuple(_stage(block, "UpDecoderBlock2D", loan) for block in module.up_blocks),
        norm_out=loan.norm(module.conv_norm_out),
        conv_out=loan.conv(module.conv_out),
    )


def borrow_encoder(module: Any, loan: Loan) -> Encoder:
    """Lend the weights of an AutoencoderKL's encoder; raises Unsupported for other structures."""
    _check(module)
    return Encoder(
        conv_in=loan.conv(module.conv_in),
        stages=tuple(_stage(block, "DownEncoderBlock2D", loan) for block in module.down_blocks),
        mid=_middle(module.mid_block, loan),
        norm_out=loan.norm(module.conv_norm_out),
        conv_out=loan.conv(module.conv_out),
    )


def _finish(x: Sum, norm: Norm, conv: Weights) -> Tensor:
    return conv2d(x.group_normed(norm, silu=True), conv.weight, conv.bias)


def _check(module: Any) -> None:
    require(type(module.conv_act) is nn.SiLU, "an activation other than SiLU")


def _stage(block: Any, expected: str, loan: Loan) -> Stage:
    expect(block, expected)
    down, up = (only(getattr(block, name, None)) for name in ("downsamplers", "upsamplers"))
    resample: Down | Up | None = None
    if down is not None:
        resample = borrow_down(down, loan)
    elif up is not None:
        resample = borrow_up(up, loan)
    return Stage(tuple(borrow_resnet(resnet, loan) for resnet in block.resnets), resample)


def _middle(block: Any, loan: Loan) -> Middle:
    expect(block, "UNetMidBlock2D")
    resnets = [borrow_resnet(resnet, loan) for resnet in block.resnets]
    attentions = [a if a is None else borrow_picture_attention(a, loan) for a in block.attentions]
    return Middle(resnets[0], tuple(zip(attentions, resnets[1:], strict=True)))
