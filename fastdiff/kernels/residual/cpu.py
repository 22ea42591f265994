"""`residual` on a CPU."""

from torch import Tensor

from fastdiff.kernels.dispatch import NATIVE, NotNative, address, expects, native_dtype, rows
from fastdiff.kernels.residual.spec import Arguments


def run(a: Arguments) -> Tensor:
    dtype = native_dtype("residual", a.x)
    if a.limit:
        raise NotNative(f"residual: got the limit {a.limit:g}; the C++ kernel does not take one")
    x = a.x.contiguous()
    samples, width = (x.shape[0] if x.ndim > 1 else 1), x.shape[-1]
    expects("residual: other", a.other, x, x.shape)
    expects("residual: shift", a.shift, x, (width,))
    expects("residual: gate", a.gate, x, (samples, width))
    times = a.enlarge
    grown = [side * times for side in x.shape[1:3]] if times > 1 else x.shape[1:-1]
    y = x.new_empty((*x.shape[:1], *grown, width) if x.ndim > 1 else x.shape)
    NATIVE.residual(
        dtype,
        x.data_ptr(),
        address(a.other),
        address(a.shift),
        rows(a.gate),
        (samples, x.numel() // (samples * width), width, times, x.shape[2] if times > 1 else 1),
        a.scale,
        y.data_ptr(),
    )
    return y
