"""`ada_norm` on a CPU: LayerNorm with weight and bias in C++, everything else torch's."""

from torch import Tensor

from fastdiff.kernels.ada_norm.spec import check, reference, summed
from fastdiff.kernels.dispatch import NATIVE, NATIVE_DTYPES


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
    dtype = NATIVE_DTYPES.get(x.dtype)
    unknown = NATIVE is None or dtype is None or x.numel() == 0
    more = rms or scale is not None or shift is not None
    if unknown or more or weight is None or bias is None:
        return reference(x, eps, weight, bias, scale, shift, gate, residual, rms)
    total = summed(x, gate, residual).contiguous()
    width = x.shape[-1]
    y = x.new_empty(x.shape)
    NATIVE.layer_norm(
        dtype,
        total.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        x.numel() // width,
        width,
        eps,
        y.data_ptr(),
    )
    return y, total if residual is not None else x.new_empty(0)
