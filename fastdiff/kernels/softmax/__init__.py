"""Softmax of float32 scores, scaled before it and rounded after it."""

from torch import Tensor

from fastdiff.kernels.dispatch import register
from fastdiff.kernels.softmax import cpu
from fastdiff.kernels.softmax.spec import SPEC

_op = register(SPEC, cpu=cpu.run, gpu="fastdiff.kernels.softmax.gpu")


def softmax(scores: Tensor, like: Tensor, scale: float = 1.0) -> Tensor:
    """exp(scale · s - m) / Σ exp(scale · s - m) over the last dimension, m the largest scale · s.

    Args:
        scores: [..., K], contiguous, float32 (float64 on a CPU).
        like: any tensor; only its dtype is read.
        scale: the factor of the scores, before the exponential.

    Returns:
        [..., K], contiguous, in `like`'s dtype. It is rounded once; the arithmetic is float32.

    Milakov & Gimelshein, Online normalizer calculation for softmax (2018), for rows that do not fit
    on chip.
    """
    y: Tensor = _op(scores, like, scale)
    return y
