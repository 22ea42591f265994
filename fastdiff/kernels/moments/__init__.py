"""Moments of channels, slab by slab: for the GroupNorm of a picture that is never there whole."""

from torch import Tensor

from fastdiff.kernels.dispatch import register
from fastdiff.kernels.moments import cpu
from fastdiff.kernels.moments.spec import SPEC

_op = register(SPEC, cpu=cpu.run, gpu="fastdiff.kernels.moments.gpu")


def moments(x: Tensor, slab: int) -> Tensor:
    """Mean and centred squares of each channel in each slab of pixels.

    mean + rest = Σ x / n, `rest` being what float32 misses of the mean, and square = Σ (x - mean -
    rest)² over the n pixels of a slab, never as E[x²] - E[x]².

    Args:
        x: [..., C] contiguous, any float dtype; what comes before C are pixels.
        slab: pixels of a slab, 1 or more; the last one has what is left.

    Returns:
        [slabs, 3, C] contiguous, float32 (float64 of float64): means, rests, squares.

    Raises:
        ValueError: `slab` is below 1, or x has no pixels.

    Chan et al. (1979) is how the slabs of a picture are combined: `models.strips`.
    """
    if slab < 1 or not x.numel():
        raise ValueError(
            f"moments: slab is {slab} and x {list(x.shape)}; expected 1 or more, and pixels"
        )
    out: Tensor = _op(x, slab)
    return out
