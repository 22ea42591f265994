"""Halves a channels-last picture by the mean of every 2×2 pixels."""

from torch import Tensor

from fastdiff.kernels.dispatch import register
from fastdiff.kernels.mean_pool import cpu
from fastdiff.kernels.mean_pool.spec import SPEC

_op = register(SPEC, cpu=cpu.run)


def mean_pool(x: Tensor) -> Tensor:
    """The mean of every 2×2 pixels of [B, Y, X, C], any float dtype: [B, Y // 2, X // 2, C].

    An odd last row or column is left out, as in `torch.nn.AvgPool2d(2)`, which runs on a GPU. On a
    CPU it is our own kernel, so that a recorded network consists only of our kernels.

    Returns:
        Contiguous, in x's dtype; sums are float32.
    """
    y: Tensor = _op(x)
    return y
