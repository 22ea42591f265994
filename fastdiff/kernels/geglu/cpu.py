"""`geglu` on a CPU: our own loop on borrowed weights, else torch's."""

from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.gelu_gate.cpu import run as gelu_gate
from fastdiff.kernels.linear.cpu import GEGLU, native


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = native("geglu", x, weight, bias, GEGLU)
    return gelu_gate(F.linear(x, weight, bias)) if out is None else out
