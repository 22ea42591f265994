"""Channels of a U-Net's input that are the same in every step, such as the picture to enlarge.

A convolution of [latents, constant channels] is the sum of two convolutions. The second does not
depend on the latents, so it is computed once per picture.
"""

from typing import NamedTuple

from torch import Tensor

from fastdiff.kernels.conv2d import conv2d
from fastdiff.models.blocks import channels_last, repeated, require
from fastdiff.models.borrow import Weights
from fastdiff.models.checks import checked
from fastdiff.models.sums import Sum, convolved


class Constant(NamedTuple):
    """conv_in where some channels of its input are constant."""

    made: Tensor
    """[n, Y, X, N] its output for the constant channels, with its bias; n = B or G·B."""
    weight: Tensor
    """Its weight for the latents: [3, 3, C, N] if `by_input`, else [N, 3, 3, C]."""
    by_input: bool

    def __call__(self, x: Tensor) -> Sum:
        """conv_in's output for latents [B, Y, X, C]: [n, Y, X, N]."""
        x = repeated(x, self.made.shape[0])
        return convolved(x, Weights(_unpacked(self.weight, self.by_input), None), self.made)


def hoist_constant(conv_in: Weights, channels: Tensor | None) -> Constant | None:
    """conv_in's output for the constant channels [n, C', Y, X], the last of its input."""
    if channels is None:
        return None
    weight = conv_in.weight
    by_input = weight.stride(0) == 1  # kernels need each part packed in the order of the whole
    own = weight.shape[1] - channels.shape[1]
    latents, others = (_packed(part, by_input) for part in weight.tensor_split((own,), 1))
    made = conv2d(channels_last(channels), _unpacked(others, by_input), conv_in.bias)
    return Constant(made, latents, by_input)


def check_constant(channels: Tensor, latents: Tensor, weight: Tensor, copies: int) -> None:
    """Raise Unsupported unless the constant channels fit the latents and the convolution."""
    count, own = channels.shape[1] if channels.ndim == 4 else 0, weight.shape[1]
    require(0 < count < own, f"constant channels of the shape {list(channels.shape)} of {own}")
    checked("the constant channels", channels, weight, count, dim=4)
    shape, pictures = list(channels.shape), latents.shape[0]
    alike = shape[0] in (pictures, copies * pictures) and channels.shape[2:] == latents.shape[2:]
    require(alike, f"constant channels of the shape {shape} for latents of {list(latents.shape)}")


def _packed(weight: Tensor, by_input: bool) -> Tensor:
    return weight.permute((2, 3, 1, 0) if by_input else (0, 2, 3, 1)).contiguous()


def _unpacked(weight: Tensor, by_input: bool) -> Tensor:
    return weight.permute((3, 2, 0, 1) if by_input else (0, 3, 1, 2))
