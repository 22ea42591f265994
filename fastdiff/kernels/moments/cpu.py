"""`moments` on a CPU."""

import torch
from torch import Tensor

from fastdiff.kernels.dispatch import NATIVE, native_dtype
from fastdiff.kernels.moments.spec import Arguments


def run(a: Arguments) -> Tensor:
    dtype = native_dtype("moments", a.x)
    x = a.x.contiguous()
    channels = x.shape[-1]
    pixels = x.numel() // channels
    out = x.new_empty((-(-pixels // a.slab), 3, channels), dtype=torch.float32)
    NATIVE.moments(dtype, x.data_ptr(), (pixels, channels, a.slab), out.data_ptr())
    return out
