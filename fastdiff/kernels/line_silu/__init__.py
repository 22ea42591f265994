"""Scale and offset of each channel, and SiLU: a GroupNorm whose moments are known."""

import torch
from torch import Tensor

from fastdiff.kernels.dispatch import register
from fastdiff.kernels.line_silu import cpu
from fastdiff.kernels.line_silu.spec import SPEC

_op = register(SPEC, cpu=cpu.run, gpu="fastdiff.kernels.line_silu.gpu")


def line_silu(x: Tensor, line: Tensor, silu: bool = True) -> Tensor:
    """y = silu((x - centre) · slope + offset) for each channel, in float32.

    Args:
        x: [..., C] contiguous, any float dtype.
        line: [3, C] contiguous, float32 (float64 for an x of float64): centre, slope and offset.
            If these are a group's mean, weight / sqrt(var + eps) and the bias, y is x's GroupNorm.
        silu: False leaves the activation out.

    Returns:
        Like x, contiguous.

    Raises:
        ValueError: `line` has another shape or dtype.

    `group_norm_silu` computes the moments, too.
    """
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if line.shape != (3, x.shape[-1]) or line.dtype != wanted:
        raise ValueError(
            f"line_silu: line is {line.dtype} {list(line.shape)}; expected {wanted}"
            f" {[3, x.shape[-1]]}"
        )
    y: Tensor = _op(x, line, silu)
    return y
