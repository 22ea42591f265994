"""`residual` on a CPU, where convolutions add it themselves: plain torch."""

from fastdiff.kernels.residual.spec import reference as run

__all__ = ["run"]
