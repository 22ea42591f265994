"""`linear` on a CPU: our own kernel, on borrowed weights."""

from torch import Tensor

from fastdiff.kernels.dispatch import NATIVE, NotNative, address, expects, native_dtype
from fastdiff.kernels.linear.spec import Arguments

ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 3, "gelu_tanh": 4}
"""The C++ kernel's numbers of the activations, `Activation` in csrc."""
GATED = {"gelu": 2, "silu": 5, "silu_first": 6}
"""The activations of gates, which halve the columns."""


def run(a: Arguments) -> Tensor:
    return native("linear", a.x, a.weight, a.bias, ACTIVATIONS[a.act], a.residual)


def native(
    what: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None = None,
) -> Tensor:
    """act(x weightᵀ + bias) + residual by our own kernel; NotNative if it does not take these.

    `what`: the op's name in errors; `activation`: the C++ kernel's number of act.
    """
    dtype = native_dtype(what, x)
    if weight.stride(0) != 1:
        raise NotNative(
            f"{what}: got a weight of strides {weight.stride()}; the C++ kernel takes columns"
            " side by side, as `models.borrow` lays them out"
        )
    x = x.contiguous()
    columns, inner = weight.shape
    rows = x.numel() // inner
    wide = columns // 2 if activation in GATED.values() else columns
    expects(f"{what}: x", x, weight, (*x.shape[:-1], inner))
    expects(f"{what}: bias", bias, x, (columns,))
    residual_rows = rows
    if residual is not None:
        pictures = residual.shape[0] if residual.shape[0] * 2 == x.shape[0] else x.shape[0]
        expects(f"{what}: residual", residual, x, (pictures, *x.shape[1:-1], wide))
        residual_rows = residual.numel() // wide
    out = x.new_empty((*x.shape[:-1], wide))
    NATIVE.conv(
        dtype,
        x.data_ptr(),
        (1, 1, rows, inner),
        (1, rows),
        (1, 1, 0),
        (1, rows),
        (weight.data_ptr(), weight.stride(1), columns),
        address(bias),
        (address(residual), residual_rows),
        activation,
        0,
        out.data_ptr(),
    )
    return out
