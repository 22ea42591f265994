"""`residual` on a CPU: in C++ unless it enlarges, which our convolutions do themselves."""

from torch import Tensor

from fastdiff.kernels.dispatch import NATIVE, NotNative, address, expects, native_dtype, rows
from fastdiff.kernels.residual.spec import Arguments


def run(a: Arguments) -> Tensor:
    dtype = native_dtype("residual", a.x)
    if a.enlarge > 1:
        raise NotNative(f"residual: got enlarge={a.enlarge}; the C++ kernel takes 1")
    x = a.x.contiguous()
    samples, width = (x.shape[0] if x.ndim > 1 else 1), x.shape[-1]
    expects("residual: other", a.other, x, x.shape)
    expects("residual: shift", a.shift, x, (width,))
    expects("residual: gate", a.gate, x, (samples, width))
    y = x.new_empty(x.shape)
    NATIVE.residual(
        dtype,
        x.data_ptr(),
        address(a.other),
        address(a.shift),
        rows(a.gate),
        (samples, x.numel() // (samples * width), width),
        y.data_ptr(),
    )
    return y
