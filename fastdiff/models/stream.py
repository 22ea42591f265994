"""The residual stream of a transformer whose branches are gated.

As with `sums.Sum`, a branch's addition is deferred to the next norm's kernel.
"""

from torch import Tensor

from fastdiff.kernels.ada_norm import ada_norm
from fastdiff.kernels.residual import residual


class Stream:
    """total + gate · branch, [B, L, D]; computed once, at the first read.

    branch: [B, L, D]; gate: [B, D], None: 1; total: [B, L, D], or [1, L, D] for all samples.
    """

    def __init__(
        self, branch: Tensor, gate: Tensor | None = None, total: Tensor | None = None
    ) -> None:
        self._branch, self._gate, self._total = branch, gate, total

    def normed(self, eps: float, shift: Tensor, scale: Tensor) -> Tensor:
        """LayerNorm · (1 + scale) + shift, with vectors [B, D]."""
        y, total = ada_norm(
            self._branch, eps, scale=scale, shift=shift, gate=self._gate, residual=self._total
        )
        if self._total is not None:
            self._close(total)
        return y

    def closed(self) -> Tensor:
        """The sum as a tensor [B, L, D]."""
        if self._total is not None:
            total = self._total.expand_as(self._branch).contiguous()
            self._close(residual(total, self._branch, gate=self._gate))
        return self._branch

    def plus(self, other: Tensor) -> "Stream":
        """This stream plus a tensor [B, L, D]."""
        if self._total is None:
            return Stream(residual(self._branch, other))
        total = self._total.expand_as(self._branch).contiguous()
        return Stream(self._branch, self._gate, residual(total, other))

    def _close(self, total: Tensor) -> None:
        self._branch, self._gate, self._total = total, None, None
