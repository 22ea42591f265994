"""`group_norm_silu` on a CPU."""

from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.concat.cpu import run as concat
from fastdiff.kernels.dispatch import NATIVE, NotNative, expects, native_dtype


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    beside: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = native_dtype("group_norm_silu", x)
    if shift is not None or (beside is not None and residual is not None):
        raise NotNative(
            "group_norm_silu: got shift, or beside with residual; the kernel in C++ takes row, and"
            " residual or beside"
        )
    if beside is not None:
        x = concat(x, beside)
        row = None if row is None else F.pad(row, (0, beside.shape[3]))
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    batch, height, width, channels = x.shape
    for name, part in {"weight": weight, "bias": bias}.items():
        expects(f"group_norm_silu: {name}", part, x, (channels,))
    expects("group_norm_silu: row", row, x, (batch, channels))
    expects("group_norm_silu: residual", residual, x, tuple(x.shape))
    y = x.new_empty(x.shape)
    total = x.new_empty(0 if residual is None else x.shape)
    NATIVE.group_norm(
        dtype,
        x.data_ptr(),
        (0, 0) if row is None else (row.data_ptr(), row.stride(0)),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        (batch, height * width, channels, groups),
        eps,
        silu,
        y.data_ptr(),
        0 if residual is None else total.data_ptr(),
    )
    return y, total
