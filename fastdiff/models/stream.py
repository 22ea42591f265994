"""The residual stream of a transformer whose branches are gated.

As with `sums.Sum`, a branch's addition is deferred to the next norm's kernel.
"""

from torch import Tensor

from fastdiff.kernels.ada_norm import ada_norm
from fastdiff.kernels.linear import linear
from fastdiff.kernels.residual import residual
from fastdiff.kernels.where import on_gpu
from fastdiff.models.borrow import Weights
from fastdiff.models.perturbed import appended


class Stream:
    """total + gate · branch, [B, L, D]; computed once, at the first read.

    branch: [B, L, D]; gate: [B, D], None: 1; total: [B, L, D], or [1, L, D] for all samples. A sum
    beyond ±limit becomes ±limit; 0: no limit.
    """

    def __init__(
        self,
        branch: Tensor,
        gate: Tensor | None = None,
        total: Tensor | None = None,
        limit: float = 0.0,
    ) -> None:
        self._branch, self._gate, self._total, self._limit = branch, gate, total, limit

    @property
    def batch(self) -> int:
        return self._branch.shape[0]

    @classmethod
    def product(cls, x: Tensor, weights: Weights, total: Tensor) -> "Stream":
        """total + x weightᵀ + bias. cuBLAS adds a bias as it writes, but not a residual."""
        if on_gpu(x):
            return cls(linear(x, weights.weight, weights.bias), total=total)
        return cls(linear(x, weights.weight, weights.bias, residual=total))

    def normed(self, eps: float, shift: Tensor, scale: Tensor) -> Tensor:
        """LayerNorm · (1 + scale) + shift, with vectors [B, D]."""
        y, total = ada_norm(
            *(self._branch, eps),
            scale=scale,
            shift=shift,
            gate=self._gate,
            residual=self._total,
            limit=self._limit,
        )
        if self._total is not None:
            self._close(total)
        return y

    def closed(self) -> Tensor:
        """The sum as a tensor [B, L, D]."""
        if self._total is not None:
            total = self._total.expand_as(self._branch).contiguous()
            self._close(residual(total, self._branch, gate=self._gate, limit=self._limit))
        return self._branch

    def limited(self, limit: float) -> "Stream":
        """The same sum with this limit; not read yet."""
        return Stream(self._branch, self._gate, self._total, limit)

    def plus(self, other: Tensor) -> "Stream":
        """This stream plus a tensor [B, L, D]."""
        if self._total is None or self._limit:
            return Stream(residual(self.closed(), other))
        total = self._total.expand_as(self._branch).contiguous()
        return Stream(self._branch, self._gate, residual(total, other))

    def _close(self, total: Tensor) -> None:
        self._branch, self._gate, self._total = total, None, None


class Streams:
    """A picture's and a text's stream, the last part of whose batch differs in some layers.

    As long as it equals the part before it, it is not computed; while layers leave it out, it
    waits.
    """

    def __init__(self, picture: Stream, text: Stream | None, batch: int, part: int) -> None:
        """batch: all samples; part: those of the last part."""
        self.picture, self.text, self._batch, self._part = picture, text, batch, part
        self.count = picture.batch
        """How many samples both have now."""
        self._last: tuple[Tensor, Tensor | None] | None = None

    @property
    def waits(self) -> bool:
        """Whether the last part waits."""
        return self._last is not None

    def leave_last(self) -> None:
        """Let the last part wait until `whole`."""
        if self._last is not None:
            return
        self._last = self._tails()
        if self.count == self._batch:
            self.count -= self._part
            self.picture = Stream(self.picture.closed()[: self.count])
            self.text = None if self.text is None else Stream(self.text.closed()[: self.count])

    def whole(self) -> None:
        """Give both all samples."""
        if self.count == self._batch:
            return
        picture, text = self._last or self._tails()
        self.picture = Stream(appended(self.picture.closed(), picture))
        if self.text is not None and text is not None:
            self.text = Stream(appended(self.text.closed(), text))
        self._last, self.count = None, self._batch

    def _tails(self) -> tuple[Tensor, Tensor | None]:
        text = None if self.text is None else self.text.closed()[-self._part :]
        return self.picture.closed()[-self._part :], text
