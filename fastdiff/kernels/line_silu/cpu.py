"""`line_silu` on a CPU."""

import torch
from torch import Tensor

from fastdiff.kernels.dispatch import NATIVE, native_dtype
from fastdiff.kernels.line_silu.spec import Arguments


def run(a: Arguments) -> Tensor:
    dtype = native_dtype("line_silu", a.x)
    x, line = a.x.contiguous(), a.line.contiguous()
    channels = x.shape[-1]
    if line.dtype != torch.float32 or line.shape != (3, channels):  # the kernel reads by address
        raise ValueError(
            f"line_silu: line is {line.dtype} {list(line.shape)}; expected torch.float32"
            f" {[3, channels]}"
        )
    y = x.new_empty(x.shape)
    NATIVE.line_silu(
        dtype,
        x.data_ptr(),
        line.data_ptr(),
        (x.numel() // channels, channels),
        a.silu,
        y.data_ptr(),
    )
    return y
