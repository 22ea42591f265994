"""`ada_norm` on a CPU: one pass in C++."""

from torch import Tensor

from fastdiff.kernels.ada_norm.spec import Arguments, check
from fastdiff.kernels.dispatch import NATIVE, NotNative, address, native_dtype, rows


def run(a: Arguments) -> tuple[Tensor, Tensor]:
    check(a)
    if a.later is not None:
        raise NotNative("ada_norm: got later; the C++ kernel does not take it")
    dtype = native_dtype("ada_norm", a.x)
    if a.limit:
        raise NotNative(f"ada_norm: got the limit {a.limit:g}; the C++ kernel does not take one")
    x = a.x.contiguous()
    y = x.new_empty(x.shape)
    total = x.new_empty(0 if a.residual is None else x.shape)
    NATIVE.ada_norm(
        dtype,
        x.data_ptr(),
        address(a.weight),
        address(a.bias),
        rows(a.scale),
        rows(a.shift),
        rows(a.gate),
        address(a.residual),
        (0 if a.residual is None else a.residual.shape[0], *x.shape),
        a.eps,
        a.rms,
        y.data_ptr(),
        0 if a.residual is None else total.data_ptr(),
    )
    return y, total
