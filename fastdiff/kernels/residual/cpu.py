"""`residual` on a CPU: in C++ where nothing is enlarged, as our convolutions enlarge themselves."""

from torch import Tensor

from fastdiff.kernels.dispatch import NATIVE, NotNative, address, expects, native_dtype, rows


def run(
    x: Tensor,
    other: Tensor | None = None,
    shift: Tensor | None = None,
    enlarge: int = 1,
    gate: Tensor | None = None,
) -> Tensor:
    dtype = native_dtype("residual", x)
    if enlarge > 1:
        raise NotNative(f"residual: got enlarge={enlarge}; the kernel in C++ takes 1")
    x = x.contiguous()
    samples, width = (x.shape[0] if x.ndim > 1 else 1), x.shape[-1]
    expects("residual: other", other, x, x.shape)
    expects("residual: shift", shift, x, (width,))
    expects("residual: gate", gate, x, (samples, width))
    y = x.new_empty(x.shape)
    NATIVE.residual(
        dtype,
        x.data_ptr(),
        address(other),
        address(shift),
        rows(gate),
        (samples, x.numel() // (samples * width), width),
        y.data_ptr(),
    )
    return y
