"""Weights as compact networks read them, and those that wait in host memory.

Weights of which only `hoist` reads may wait: once a picture they are copied to the device, a piece
at a time, multiplied by, and forgotten. The parameters are views of the host memory meanwhile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.kernels.linear import linear

PIECE = 128 << 20
"""At most this many bytes of waiting weights are on the device at a time, but at least one row."""


@dataclass(frozen=True)
class Weights:
    """Linear layers [N, D] stacked along N, or a convolution [N, C, k, k]; and their bias [N]."""

    weight: Tensor
    bias: Tensor | None
    waits: bool = False
    """Whether they wait in host memory; then only `project` may use them."""


@dataclass(frozen=True)
class Norm:
    """The affine parameters of a GroupNorm, or of a LayerNorm if `groups` is 0."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float


def may_wait(device: torch.device) -> bool:
    """Whether weights on this device could wait elsewhere: a CPU has only the host's memory."""
    return device.type == "cuda"


def host_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Host memory from which a GPU copies by itself."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)


def project(x: Tensor, weights: Weights) -> Tensor:
    """x weightᵀ + bias: [..., D] -> [..., N], whether the weights wait or not."""
    if not weights.waits or x.is_meta:
        return linear(x, weights.weight, weights.bias)
    made = [linear(x, *_brought(*piece, x.device)) for piece in _pieces(weights)]
    if x.device.type == "cuda":  # later edits of the parameters must not overtake the copies
        torch.cuda.current_stream(x.device).synchronize()
    return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def _pieces(weights: Weights) -> Iterator[tuple[Tensor, Tensor | None]]:
    weight, bias = weights.weight, weights.bias
    rows = max(1, PIECE // max(1, weight[:1].nbytes))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        yield weight[part], None if bias is None else bias[part]


def _brought(
    weight: Tensor, bias: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Copies on the device, in the order of its present stream."""
    own = weight.to(device, non_blocking=True, copy=True)
    return own, None if bias is None else bias.to(device, non_blocking=True, copy=True)
