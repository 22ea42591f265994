"""`joint_attention` on a CPU: the reference, by our own attention."""

from typing import Any

from torch import Tensor

from fastdiff.kernels.attention import cpu
from fastdiff.kernels.joint_attention.spec import reference


def run(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return reference(*arguments, **options | {"attend": cpu.run})


def plain(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """By torch's attention, for what `run` does not take."""
    return reference(*arguments, **options | {"attend": cpu.plain})
