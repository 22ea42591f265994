"""Convolution of channels-last pictures, fused with the operations around it in a U-Net."""

from collections.abc import Sequence

from torch import Tensor

from fastdiff.kernels.conv2d import cpu, cudnn
from fastdiff.kernels.conv2d.spec import SPEC
from fastdiff.kernels.dispatch import register

_op = register(SPEC, cpu=cpu.run, library=cudnn.run)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: Sequence[int] = (1, 1),
    size: Sequence[int] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """conv(enlarge(x)) + bias + residual, channels last.

    Args:
        x: [B, Y, X, C], float32 or bfloat16 for our own kernel, any float for torch's.
        weight: [N, C, k, k] as in `torch.nn.Conv2d`, of any strides. On a CPU our own kernel
            needs the memory layout [k, k, C, N] (see `models.borrow`); on a GPU cuDNN runs,
            fastest on channels-last memory.
        bias: [N].
        stride: of the window.
        padding: zeros (before, after), in pixels, on both axes.
        size: (rows, columns) to which the picture is enlarged first, by nearest neighbour.
        residual: of the output's shape, contiguous, added last.

    Returns:
        [B, Y', X', N], contiguous, in x's dtype; sums are float32.

    The CPU kernel exists because oneDNN either reorders the weights at every call or keeps a
    second, packed copy of the model; our kernel reads the weights in place.
    """
    y: Tensor = _op(x, weight, bias, stride, padding, size, residual)
    return y
