"""`conv2d` on a CPU: our own kernels, on borrowed weights."""

import torch
from torch import Tensor

from fastdiff.kernels import choices
from fastdiff.kernels.conv2d.spec import SPEC, Arguments
from fastdiff.kernels.dispatch import NATIVE, NotNative, expects, native_dtype

ALGORITHMS = {"direct": 0, "winograd22": 1, "winograd24": 2}
"""The numbers of csrc's `Algorithm`: direct products, Winograd's F(2x2, 3x3) and F(2x4, 3x3)."""


WINOGRAD24_CHANNELS = 4
"""With fewer channels its rounding errors exceed the error budget."""


def run(a: Arguments, algorithm: str | None = None) -> Tensor:
    """Use the given algorithm, or if None the one that `choices` names."""
    if algorithm is None:
        algorithm = "direct" if NATIVE is None else choices.runs(SPEC, a, NATIVE.isa())
    if not exact(a, algorithm):
        algorithm = "winograd22"
    return convolved(a, ALGORITHMS.get(algorithm, 0))


def exact(a: Arguments, algorithm: str) -> bool:
    """Whether an algorithm computes a call within the error budget."""
    return algorithm != "winograd24" or a.x.shape[3] >= WINOGRAD24_CHANNELS


def convolved(a: Arguments, algorithm: int) -> Tensor:
    """Use one of `ALGORITHMS`. NotNative if our kernels do not take these arguments, ValueError if
    only that algorithm does not."""
    dtype = native_dtype("conv2d", a.x)
    if not _packed(a.weight):
        raise NotNative(
            f"conv2d: got a weight of strides {a.weight.stride()}; the C++ kernel takes columns"
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
        algorithm,
        out.data_ptr(),
    )
    return out


def _packed(weight: Tensor) -> bool:
    """Whether the memory is [kernel, kernel, channels, columns] with adjacent columns."""
    _, channels, kernel, _ = weight.shape
    ld = weight.stride(1)
    taps = (kernel * channels * ld, channels * ld)
    return weight.stride(0) == 1 and (kernel == 1 or weight.stride()[2:] == torch.Size(taps))
