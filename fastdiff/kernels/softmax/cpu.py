"""`softmax` on a CPU: torch's ops."""

from torch import Tensor

from fastdiff.kernels.softmax.spec import Arguments, formula


def run(a: Arguments) -> Tensor:
    return formula(a)
