"""`group_norm_silu` on a CPU."""

from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels import concat
from fastdiff.kernels.dispatch import NATIVE, NotNative, address, expects, native_dtype, rows
from fastdiff.kernels.group_norm_silu.spec import Arguments

ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 3}
"""The C++ kernel's numbers of the activations, `Activation` in csrc."""


def run(a: Arguments) -> tuple[Tensor, Tensor]:
    x, row, residual = a.x, a.row, a.residual
    dtype = native_dtype("group_norm_silu", x)
    if a.shift is not None or a.keep or (a.beside is not None and residual is not None):
        raise NotNative(
            "group_norm_silu: got shift, keep, or beside with residual; the C++ kernel takes row,"
            " and residual or beside"
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
    expects("group_norm_silu: scale_shift", a.scale_shift, x, (batch, 2 * channels))
    y = x.new_empty(x.shape)
    total = x.new_empty(0 if residual is None else x.shape)
    NATIVE.group_norm(
        dtype,
        x.data_ptr(),
        rows(row),
        address(residual),
        a.weight.data_ptr(),
        a.bias.data_ptr(),
        rows(a.scale_shift),
        (batch, height * width, channels, a.groups),
        a.eps,
        ACTIVATIONS[a.act],
        y.data_ptr(),
        0 if residual is None else total.data_ptr(),
    )
    return y, total
