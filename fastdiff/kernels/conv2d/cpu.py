"""`conv2d` on a CPU: our own loop, on borrowed weights."""

import torch
from torch import Tensor

from fastdiff.kernels.conv2d.spec import Arguments
from fastdiff.kernels.dispatch import NATIVE, NotNative, expects, native_dtype


def run(a: Arguments) -> Tensor:
    dtype = native_dtype("conv2d", a.x)
    if not _packed(a.weight):
        raise NotNative(
            f"conv2d: got a weight of strides {a.weight.stride()}; the kernel in C++ takes columns"
            " side by side, as `models.borrow` lays them out"
        )
    x = a.x.contiguous()
    batch, height, width, _ = x.shape
    columns, kernel, ld = a.weight.shape[0], a.weight.shape[2], a.weight.stride(1)
    stride = a.stride
    up_height, up_width = a.size if a.size is not None else (height, width)
    border = a.padding[0] + a.padding[1] - kernel
    out_height, out_width = (up_height + border) // stride + 1, (up_width + border) // stride + 1
    expects("conv2d: x", x, a.weight, (batch, height, width, a.weight.shape[1]))
    expects("conv2d: bias", a.bias, x, (columns,))
    expects("conv2d: residual", a.residual, x, (batch, out_height, out_width, columns))
    out = x.new_empty((batch, out_height, out_width, columns))
    NATIVE.conv(
        dtype,
        x.data_ptr(),
        x.shape,
        (up_height, up_width),
        (kernel, stride, a.padding[0]),
        (out_height, out_width),
        (a.weight.data_ptr(), ld, columns),
        0 if a.bias is None else a.bias.data_ptr(),
        (0 if a.residual is None else a.residual.data_ptr(), batch * out_height * out_width),
        0,
        algorithm(a),
        out.data_ptr(),
    )
    return out


def algorithm(a: Arguments) -> int:
    """Which of `Algorithm` in csrc/kernels.h computes it: 0 is the direct loop."""
    return 0


def _packed(weight: Tensor) -> bool:
    """Whether the memory is [kernel, kernel, channels, columns] with columns side by side."""
    _, channels, kernel, _ = weight.shape
    ld = weight.stride(1)
    taps = (kernel * channels * ld, channels * ld)
    return weight.stride(0) == 1 and (kernel == 1 or weight.stride()[2:] == torch.Size(taps))
