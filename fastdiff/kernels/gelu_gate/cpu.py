"""`gelu_gate` on a CPU: torch's ops, without a tensor for the product."""

from torch import Tensor

from fastdiff.kernels.gelu_gate.spec import ACTIVATIONS, Arguments


def run(a: Arguments) -> Tensor:
    value, gate = (a.h if a.bias is None else a.h + a.bias).chunk(2, dim=-1)
    return ACTIVATIONS[a.act](gate).mul_(value).contiguous()
