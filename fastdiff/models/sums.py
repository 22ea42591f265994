"""Deferred sums: on a GPU, a bias or a residual then costs no launch of its own.

torch would add a convolution's bias and a residual in one kernel each, after cuDNN or cuBLAS has
written its result and before a norm reads it again. A `Sum` keeps the terms apart until the norm's
kernel adds them. On a CPU our own kernels add them as they write, so nothing is deferred.
"""

from typing import Any

from torch import Tensor

from fastdiff.kernels.ada_norm import ada_norm
from fastdiff.kernels.conv2d import conv2d
from fastdiff.kernels.group_norm_silu import group_norm_silu
from fastdiff.kernels.linear import linear
from fastdiff.kernels.residual import residual
from fastdiff.kernels.where import on_gpu
from fastdiff.models.borrow import Norm, Weights


class Sum:
    """x + shift + other, [B, ..., C]; computed once, at the first read.

    shift: [C]; other: like x.
    """

    def __init__(self, x: Tensor, shift: Tensor | None = None, other: Tensor | None = None) -> None:
        self._x, self._shift, self._other = x, shift, other

    @property
    def batch(self) -> int:
        return self._x.shape[0]

    @property
    def twice(self) -> tuple[int, int]:
        """The rows and columns of the picture after `enlarged`."""
        return 2 * self._x.shape[1], 2 * self._x.shape[2]

    @property
    def waits(self) -> bool:
        """Whether a term is still to be added."""
        return self._shift is not None or self._other is not None

    def closed(self) -> Tensor:
        """The sum as a tensor."""
        if self.waits:
            self._close(residual(self._x, self._other, self._shift))
        return self._x

    def enlarged(self) -> Tensor:
        """The sum as a picture of twice the height and width, by nearest pixels."""
        return residual(self._x, self._other, self._shift, enlarge=2)

    def group_normed(
        self,
        norm: Norm,
        act: str,
        row: Tensor | None = None,
        beside: Tensor | None = None,
        scale_shift: Tensor | None = None,
    ) -> Tensor:
        """The GroupNorm of [x + row, beside], modulated and activated: see `group_norm_silu`. `row`
        is not part of the sum."""
        if row is not None and self._other is not None:
            self.closed()
        added = (row, self._other, beside, self._shift)
        y, total = group_norm_silu(
            self._x, norm.weight, norm.bias, norm.groups, norm.eps, act, *added, scale_shift
        )
        if self._other is None:
            return y
        self._close(total)
        return y

    def layer_normed(self, norm: Norm) -> Tensor:
        if self._shift is not None:
            self.closed()
        y, total = ada_norm(self._x, norm.eps, norm.weight, norm.bias, residual=self._other)
        if self._other is not None:
            self._close(total)
        return y

    def _close(self, total: Tensor) -> None:
        self._x, self._shift, self._other = total, None, None


def convolved(x: Tensor, weights: Weights, other: Tensor | None = None, **window: Any) -> Sum:
    """conv(x) + bias + other; `window`: further arguments of `conv2d`."""
    if on_gpu(x):
        return Sum(conv2d(x, weights.weight, **window), weights.bias, other)
    return Sum(conv2d(x, weights.weight, weights.bias, residual=other, **window))


def projected(x: Tensor, weights: Weights, other: Tensor) -> Sum:
    """x weightᵀ + bias + other. cuBLAS adds a bias as it writes, but not a residual."""
    if on_gpu(x) and other.shape[0] == x.shape[0]:
        return Sum(linear(x, weights.weight, weights.bias), other=other)
    return Sum(linear(x, weights.weight, weights.bias, residual=other))
