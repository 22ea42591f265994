"""Moments of channels, slab by slab, for the GroupNorm of a picture that is computed in strips."""

from torch import Tensor

from fastdiff.kernels.dispatch import register
from fastdiff.kernels.moments import cpu
from fastdiff.kernels.moments.spec import SPEC

_op = register(SPEC, cpu=cpu.run, gpu="fastdiff.kernels.moments.gpu")


def moments(x: Tensor, slab: int) -> Tensor:
    """Mean and centred squares of each channel in each slab of pixels.

    mean + rest = Σ x / n, where `rest` is the mean's float32 rounding error, and square =
    Σ (x - mean - rest)² over the n pixels of a slab, never as E[x²] - E[x]².

    Args:
        x: [..., C] contiguous, any float dtype; all dimensions before C are pixels.
        slab: pixels per slab, at least 1; the last slab has the remainder.

    Returns:
        [slabs, 3, C] contiguous, float32 (float64 for float64): means, rests, squares.

    Raises:
        ValueError: `slab` is below 1, or x has no pixels.

    `models.strips` combines the slabs of a picture by Chan et al. (1979).
    """
    if slab < 1 or not x.numel():
        raise ValueError(
            f"moments: slab is {slab} and x {list(x.shape)}; expected 1 or more, and pixels"
        )
    out: Tensor = _op(x, slab)
    return out
