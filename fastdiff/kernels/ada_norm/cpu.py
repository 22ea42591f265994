"""`ada_norm` on a CPU: one pass in C++."""

from torch import Tensor

from fastdiff.kernels.ada_norm.spec import check
from fastdiff.kernels.dispatch import NATIVE, address, native_dtype, rows


def run(
    x: Tensor,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    check(x, weight, bias, scale, shift, gate, residual, rms)
    dtype = native_dtype("ada_norm", x)
    x = x.contiguous()
    y = x.new_empty(x.shape)
    total = x.new_empty(0 if residual is None else x.shape)
    NATIVE.ada_norm(
        dtype,
        x.data_ptr(),
        address(weight),
        address(bias),
        rows(scale),
        rows(shift),
        rows(gate),
        address(residual),
        (0 if residual is None else residual.shape[0], *x.shape),
        eps,
        rms,
        y.data_ptr(),
        0 if residual is None else total.data_ptr(),
    )
    return y, total
