"""`mean_pool` on a CPU."""

from torch import Tensor

from fastdiff.kernels.dispatch import NATIVE, native_dtype
from fastdiff.kernels.mean_pool.spec import Arguments


def run(a: Arguments) -> Tensor:
    dtype = native_dtype("mean_pool", a.x)
    x = a.x.contiguous()
    batch, height, width, channels = x.shape
    y = x.new_empty((batch, height // 2, width // 2, channels))
    NATIVE.mean_pool(dtype, x.data_ptr(), x.shape, y.data_ptr())
    return y
