"""`layer_norm` on a CPU."""

from torch import Tensor

from fastdiff.kernels.dispatch import NATIVE, NATIVE_DTYPES, expects
from fastdiff.kernels.layer_norm.spec import reference


def run(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    dtype = NATIVE_DTYPES.get(x.dtype)
    if NATIVE is None or dtype is None or x.numel() == 0:
        return reference(x, weight, bias, eps)
    x = x.contiguous()
    width = x.shape[-1]
    expects("layer_norm: weight", weight, x, (width,))
    expects("layer_norm: bias", bias, x, (width,))
    y = x.new_empty(x.shape)
    NATIVE.layer_norm(
        dtype,
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        x.numel() // width,
        width,
        eps,
        y.data_ptr(),
    )
    return y
