"""How an exported file turns heads by their tokens' positions, in real numbers of one dtype."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

Turns = tuple[Tensor, Tensor]
"""Cosines and sines [S, K]; both columns of a pair have the same."""
BITS = 12
"""Bits of a coarse frequency: its product with a position below 4096 is exact in float32."""


class Turned(nn.Module):
    """diffusers' FluxPosEmbed and Flux2PosEmbed: positions [S, axes] -> cosines and sines [S, K].

    diffusers computes the angles in float64, for which TensorRT has nothing and ONNX Runtime no
    cosine. Here a frequency is the sum of two float32 numbers, the coarse one of few bits, and the
    turns by both are put together.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        axes, found = [], []
        for axis, width in enumerate(source.axes_dim):
            steps = torch.arange(0, width, 2, dtype=torch.float64)
            found.append(1.0 / source.theta ** (steps / width))
            axes += [axis] * len(steps)
        frequencies = torch.cat(found)
        mantissa, exponent = torch.frexp(frequencies)
        coarse = torch.ldexp((mantissa * 2**BITS).round() / 2**BITS, exponent)
        self.register_buffer("axes", torch.tensor(axes))
        self.register_buffer("coarse", coarse.float())
        self.register_buffer("fine", (frequencies - coarse).float())

    def forward(self, positions: Tensor) -> Turns:
        axes, coarse, fine = self.axes, self.coarse, self.fine
        assert isinstance(axes, Tensor)
        assert isinstance(coarse, Tensor)
        assert isinstance(fine, Tensor)
        places = positions.to(coarse.dtype).index_select(1, axes)
        first, rest = places * coarse, places * fine
        cos = first.cos() * rest.cos() - first.sin() * rest.sin()
        sin = first.sin() * rest.cos() + first.cos() * rest.sin()
        return both(cos), both(sin)


class TurnedOnce(nn.Module):
    """diffusers' QwenEmbedRope: positions [S, axes] -> cosines and sines [S, K] of float32
    angles."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        axes, found = [], []
        for axis, width in enumerate(source.axes_dim):
            steps = torch.arange(0, width, 2).to(torch.float32).div(width)
            found.append(1.0 / torch.pow(source.theta, steps))
            axes += [axis] * len(steps)
        self.register_buffer("axes", torch.tensor(axes))
        self.register_buffer("frequencies", torch.cat(found))

    def forward(self, positions: Tensor) -> Turns:
        axes, frequencies = self.axes, self.frequencies
        assert isinstance(axes, Tensor)
        assert isinstance(frequencies, Tensor)
        angles = positions.to(frequencies.dtype).index_select(1, axes) * frequencies
        return both(angles.cos()), both(angles.sin())


def attending(processor: Any, module: Any) -> nn.Module:
    """diffusers' Attention with another processor, on the same weights."""
    made: Any = copy.copy(module)
    made.processor, made.head_dim = processor, module.inner_dim // module.heads
    own: nn.Module = made
    return own


def both(table: Tensor) -> Tensor:
    """[S, K / 2] -> [S, K]: both columns of a pair have the same."""
    return torch.stack((table, table), dim=-1).flatten(1)
