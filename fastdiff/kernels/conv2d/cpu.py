"""`conv2d` on a CPU: our own loop, on borrowed weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.kernels.dispatch import NATIVE, NotNative, expects, native_dtype


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: Sequence[int] = (1, 1),
    size: Sequence[int] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    dtype = native_dtype("conv2d", x)
    if not _packed(weight):
        raise NotNative(
            f"conv2d: got a weight of strides {weight.stride()}; the kernel in C++ takes columns"
            " side by side, as `models.borrow` lays them out"
        )
    x = x.contiguous()
    batch, height, width, _ = x.shape
    columns, kernel, ld = weight.shape[0], weight.shape[2], weight.stride(1)
    up_height, up_width = size if size is not None else (height, width)
    border = padding[0] + padding[1] - kernel
    out_height, out_width = (up_height + border) // stride + 1, (up_width + border) // stride + 1
    expects("conv2d: x", x, weight, (batch, height, width, weight.shape[1]))
    expects("conv2d: bias", bias, x, (columns,))
    expects("conv2d: residual", residual, x, (batch, out_height, out_width, columns))
    out = x.new_empty((batch, out_height, out_width, columns))
    NATIVE.conv(
        dtype,
        x.data_ptr(),
        x.shape,
        (up_height, up_width),
        (kernel, stride, padding[0]),
        (out_height, out_width),
        (weight.data_ptr(), ld, columns),
        0 if bias is None else bias.data_ptr(),
        (0 if residual is None else residual.data_ptr(), batch * out_height * out_width),
        0,
        out.data_ptr(),
    )
    return out


def _packed(weight: Tensor) -> bool:
    """Whether the memory is [kernel, kernel, channels, columns] with columns side by side."""
    _, channels, kernel, _ = weight.shape
    ld = weight.stride(1)
    taps = (kernel * channels * ld, channels * ld)
    return weight.stride(0) == 1 and (kernel == 1 or weight.stride()[2:] == torch.Size(taps))
