"""LayerNorm over the last dimension."""

from torch import Tensor

from fastdiff.kernels.dispatch import register
from fastdiff.kernels.layer_norm import cpu
from fastdiff.kernels.layer_norm.spec import SPEC

_op = register(SPEC, cpu=cpu.run)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) · weight + bias, over the last dimension.

    Args:
        x: [..., D], any float dtype; statistics are float32, taken around the mean.
        weight, bias: [D].
        eps: added to the variance.

    Returns:
        Like x, contiguous.
    """
    y: Tensor = _op(x, weight, bias, eps)
    return y
