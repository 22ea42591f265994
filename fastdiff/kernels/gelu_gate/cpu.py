"""`gelu_gate` on a CPU: torch's ops, without a tensor for the product."""

from torch import Tensor

from fastdiff.kernels.gelu_gate.spec import ACTIVATIONS, Arguments, halves


def run(a: Arguments) -> Tensor:
    value, gate = halves(a)
    return ACTIVATIONS[a.act](gate).mul_(value).contiguous()
