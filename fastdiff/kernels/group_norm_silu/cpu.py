"""`group_norm_silu` on a CPU."""

from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels import concat
from fastdiff.kernels.dispatch import NATIVE, NotNative, expects, native_dtype
from fastdiff.kernels.group_norm_silu.spec import Arguments


def run(a: Arguments) -> tuple[Tensor, Tensor]:
    x, row, residual = a.x, a.row, a.residual
    dtype = native_dtype("group_norm_silu", x)
    if a.shift is not None or (a.beside is not None and residual is not None):
        raise NotNative(
            "group_norm_silu: got shift, or beside with residual; the C++ kernel takes row, and"
            " residual or beside"
        )
    if a.beside is not None:
        x = concat.cpu.run(concat.spec.Arguments(x, a.beside))
        row = None if row is None else F.pad(row, (0, a.beside.shape[3]))
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    batch, height, width, channels = x.shape
    expects("group_norm_silu: weight", a.weight, x, (channels,))
    expects("group_norm_silu: bias", a.bias, x, (channels,))
    expects("group_norm_silu: row", row, x, (batch, channels))
    expects("group_norm_silu: residual", residual, x, tuple(x.shape))
    y = x.new_empty(x.shape)
    total = x.new_empty(0 if residual is None else x.shape)
    NATIVE.group_norm(
        dtype,
        x.data_ptr(),
        (0, 0) if row is None else (row.data_ptr(), row.stride(0)),
        0 if residual is None else residual.data_ptr(),
        a.weight.data_ptr(),
        a.bias.data_ptr(),
        (batch, height * width, channels, a.groups),
        a.eps,
        a.silu,
        y.data_ptr(),
        0 if residual is None else total.data_ptr(),
    )
    return y, total
