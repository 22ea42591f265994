"""GroupNorm and SiLU of channels-last pictures in one pass over memory."""

from typing import overload

from torch import Tensor

from fastdiff.kernels.dispatch import register
from fastdiff.kernels.group_norm_silu import cpu
from fastdiff.kernels.group_norm_silu.spec import SPEC

_op = register(
    SPEC,
    cpu=cpu.run,
    gpu="fastdiff.kernels.group_norm_silu.gpu",
    others={"cuda": "fastdiff.kernels.group_norm_silu.cuda"},
)


@overload
def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    row: Tensor | None = None,
    residual: None = None,
) -> Tensor: ...
@overload
def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    row: Tensor | None = None,
    *,
    residual: Tensor,
) -> tuple[Tensor, Tensor]: ...
def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    row: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = silu((t - mean) / sqrt(var + eps) · weight + bias) with t = x + row + residual.

    Mean and variance are those of each group of C / groups channels in each picture, in float32,
    the variance around the mean (never E[t²] - E[t]²).

    Args:
        x: [B, Y, X, C], float32, bfloat16 or float16.
        weight, bias: [C].
        groups: divides C; neither needs to be a power of two.
        eps: added to the variance.
        silu: False leaves the activation out.
        row: [B, C] of any batch stride, added to every pixel before the statistics (the projected
            time embedding).
        residual: like x, added before the statistics.

    Returns:
        y, like x and contiguous; with a residual (y, t).

    Raises:
        ValueError: C is not a multiple of groups.

    Wu & He, Group Normalization (2018); Chan et al. (1979) for combining partial moments.
    """
    if x.shape[-1] % groups:
        raise ValueError(
            f"group_norm_silu: {x.shape[-1]} channels do not split into {groups} groups"
        )
    y, total = _op(x, weight, bias, groups, eps, silu, row, residual)
    return y if residual is None else (y, total)
