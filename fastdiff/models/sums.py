"""Deferred sums: on a GPU, a bias or a residual then costs no additional launch.

torch would add a convolution's bias and a residual in one kernel each, after cuDNN or cuBLAS has
written its result and before a norm reads it again. A `Sum` keeps the terms apart until the norm's
kernel adds them. On a CPU our own kernels add them as they write, so nothing is deferred.
"""

from collections.abc import Callable
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
        last: bool = False,
    ) -> Tensor:
        """The GroupNorm of [x + row, beside], modulated and activated: see `group_norm_silu`. The
        sum then has the channels of `beside`, too, but not `row`. last: it is not read again."""
        if row is not None and self._other is not None:
            self.closed()
        keep = (self.waits or beside is not None) and row is None and not last
        y, total = group_norm_silu(
            *(self._x, norm.weight, norm.bias, norm.groups, norm.eps, act),
            *(row, self._other, beside, self._shift, scale_shift, keep),
        )
        if keep:
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


def closing(x: Sum, norm: Norm, branch: Callable[[Tensor], Tensor], weights: Weights) -> Sum:
    """x + branch(norm(x)) weightᵀ + bias, where no norm follows that would add. On a GPU the norm
    adds the bias to x, and the product adds itself in x's memory."""
    if x._other is None or x._shift is not None or not on_gpu(x._x):
        return projected(branch(x.layer_normed(norm)), weights, x.closed())
    given = (norm.eps, norm.weight, norm.bias)
    y, total = ada_norm(x._x, *given, residual=x._other, later=weights.bias)
    total.flatten(0, -2).addmm_(branch(y).flatten(0, -2), weights.weight.t())
    return Sum(total)


def projected(x: Tensor, weights: Weights, other: Tensor) -> Sum:
    """x weightᵀ + bias + other. cuBLAS adds a bias as it writes, but not a residual."""
    if on_gpu(x) and other.shape[0] == x.shape[0]:
        return Sum(linear(x, weights.weight, weights.bias), other=other)
    return Sum(linear(x, weights.weight, weights.bias, residual=other))
