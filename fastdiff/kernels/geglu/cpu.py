"""`geglu` on a CPU: our own loop, on borrowed weights."""

from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.gelu_gate.cpu import run as gelu_gate
from fastdiff.kernels.linear.cpu import GEGLU, native


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return native("geglu", x, weight, bias, GEGLU)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's product, then the gate, for what `run` does not take."""
    return gelu_gate(F.linear(x, weight, bias))
