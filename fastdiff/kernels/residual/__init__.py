"""The end of a residual branch where no norm follows: its sum, enlarged if it is to be."""

from torch import Tensor

from fastdiff.kernels.dispatch import register
from fastdiff.kernels.residual import cpu
from fastdiff.kernels.residual.spec import SPEC

_op = register(SPEC, cpu=cpu.run, gpu="fastdiff.kernels.residual.gpu")


def residual(
    x: Tensor,
    other: Tensor | None = None,
    shift: Tensor | None = None,
    enlarge: int = 1,
    gate: Tensor | None = None,
) -> Tensor:
    """x + shift + gate · other, each pixel `enlarge` times in both directions (nearest neighbour).

    Args:
        x: [B, ..., C] contiguous, any float dtype: pixels or tokens; to be enlarged a picture,
            [B, Y, X, C].
        other: like x, contiguous.
        shift: [C] in x's dtype: the convolution's bias.
        enlarge: 1 or more; a U-Net's and an autoencoder's upsampling is 2.
        gate: [B, C] in x's dtype, one row for each sample, of any batch stride; None: 1.

    Returns:
        Like x, or [B, enlarge·Y, enlarge·X, C]; contiguous, sums are float32.

    Raises:
        ValueError: `enlarge` is below 1 or of no picture, shapes differ, or a gate has no `other`.

    Where a norm follows, `group_norm_silu` and `ada_norm` take the same sum on the way.
    """
    if enlarge < 1 or (enlarge > 1 and x.ndim != 4):
        raise ValueError(
            f"residual: enlarge is {enlarge} and x {list(x.shape)}; expected 1 or more, and a"
            " picture [B, Y, X, C] to be enlarged"
        )
    if other is not None and other.shape != x.shape:
        raise ValueError(f"residual: other is {list(other.shape)}; expected {list(x.shape)}")
    if shift is not None and shift.shape != x.shape[-1:]:
        raise ValueError(f"residual: shift is {list(shift.shape)}; expected {[x.shape[-1]]}")
    if gate is not None and (other is None or gate.shape != (x.shape[0], x.shape[-1])):
        got = "no other" if other is None else list(gate.shape)
        raise ValueError(
            f"residual: gate has {got}; expected {[x.shape[0], x.shape[-1]]} and an other to scale"
        )
    y: Tensor = _op(x, other, shift, enlarge, gate)
    return y
