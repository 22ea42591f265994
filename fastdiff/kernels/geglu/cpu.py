"""`geglu` on a CPU: our own kernel, on borrowed weights."""

from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.geglu.spec import Arguments
from fastdiff.kernels.gelu_gate import cpu, spec
from fastdiff.kernels.linear.cpu import GATED, native


def run(a: Arguments) -> Tensor:
    return native("geglu", a.x, a.weight, a.bias, GATED[a.act])


def plain(a: Arguments) -> Tensor:
    """torch's product, then the gate, for arguments that `run` does not take."""
    return cpu.run(spec.Arguments(F.linear(a.x, a.weight, a.bias), act=a.act))
