"""Sequences of tokens that lie one behind the other, joined and cut by our own kernels.

A recording on a CPU consists of our kernels alone, of which none copies a part of a tensor.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from fastdiff.kernels.concat import concat
from fastdiff.kernels.where import on_gpu


def joined(first: Tensor, second: Tensor) -> Tensor:
    """[B, T, D] and [B, L, D] -> [B, T + L, D]."""
    batch, _, width = first.shape
    both = concat(first.reshape(batch, -1), second.reshape(batch, -1))
    return both.view(batch, -1, width)


def chained(parts: Sequence[Tensor]) -> Tensor:
    """Contiguous parts [n, …] -> [N, …], one behind the other."""
    if len(parts) == 1:
        return parts[0]
    if on_gpu(parts[0]):
        return torch.cat(list(parts))
    rows = [part.view(1, -1) for part in parts]
    return reduce(concat, rows).view(-1, *parts[0].shape[1:])


def cut(x: Tensor, start: int, stop: int) -> Tensor:
    """The tokens from `start` to `stop` of x [B, S, D], contiguous."""
    if on_gpu(x):
        return x[:, start:stop].contiguous()
    return chained([one[None, start:stop] for one in x])
