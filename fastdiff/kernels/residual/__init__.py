"""The end of a residual branch that no norm follows: its sum, enlarged if needed."""

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
    scale: float = 1.0,
    limit: float = 0.0,
) -> Tensor:
    """scale · (x + shift + gate · other), each pixel repeated `enlarge` times in both directions.

    Args:
        x: [B, ..., C] contiguous, any float dtype: pixels or tokens; with `enlarge` > 1 a picture,
            [B, Y, X, C].
        other: like x, contiguous.
        shift: [C] in x's dtype: the convolution's bias.
        enlarge: at least 1; 2 in the upsampling of U-Nets and autoencoders.
        gate: [B, C] in x's dtype, one row per sample, of any batch stride; None: 1.
        scale: the factor of the whole sum (a resnet divides its sum by its output_scale_factor).
        limit: a result beyond ±limit becomes ±limit; 0: no limit.

    Returns:
        Like x, or [B, enlarge·Y, enlarge·X, C]; contiguous, sums are float32.

    Raises:
        ValueError: `enlarge` is below 1, or x is not a picture to enlarge; shapes differ, or there
            is a gate without `other`.

    If a norm follows, `group_norm_silu` and `ada_norm` compute the same sum themselves.
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
    y: Tensor = _op(x, other, shift, enlarge, gate, scale, limit)
    return y
