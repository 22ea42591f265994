"""`ada_norm` on a CPU: LayerNorm with weight and bias in C++; all else it refuses."""

from torch import Tensor

from fastdiff.kernels.ada_norm.spec import check, summed
from fastdiff.kernels.dispatch import NATIVE, NotNative, native_dtype


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
    if rms or scale is not None or shift is not None or weight is None or bias is None:
        raise NotNative(
            "ada_norm: got RMSNorm, scale or shift, or no weight and bias; the kernel in C++ takes"
            " a LayerNorm with weight and bias alone"
        )
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
