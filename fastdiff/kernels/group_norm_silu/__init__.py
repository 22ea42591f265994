"""GroupNorm, modulation and activation of channels-last pictures in one pass over memory."""

from torch import Tensor

from fastdiff.kernels.dispatch import register
from fastdiff.kernels.group_norm_silu import cpu
from fastdiff.kernels.group_norm_silu.spec import ACTIVATIONS, SPEC

_op = register(
    SPEC,
    cpu=cpu.run,
    gpu="fastdiff.kernels.group_norm_silu.gpu",
    others={"cuda": "fastdiff.kernels.group_norm_silu.cuda"},
)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    act: str = "silu",
    row: Tensor | None = None,
    residual: Tensor | None = None,
    beside: Tensor | None = None,
    shift: Tensor | None = None,
    scale_shift: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """y = act(n · (1 + scale) + offset), n = (t - mean) / sqrt(var + eps) · weight + bias, where t
    is x + shift + row + residual, followed by the channels of `beside`.

    Mean and variance are over each group of (C + C2) / groups channels of each picture, in float32;
    the variance is around the mean (never E[t²] - E[t]²).

    Args:
        x: [B, Y, X, C], float32, bfloat16 or float16.
        weight, bias: [C + C2].
        groups: divides C + C2; neither needs to be a power of two. A group may span channels of
            both x and beside.
        eps: added to the variance.
        act: "silu", "gelu" (the exact one, by erf) or "none".
        row: [B, C] of any batch stride, added to every pixel of x before the statistics (the
            projected time embedding).
        residual: like x, added to it before the statistics.
        beside: [B, Y, X, C2], a second picture whose channels follow x's (a U-Net's skip
            connection, read in place); or [B / 2, Y, X, C2] if the halves of guidance share it.
            Nothing is added to it.
        shift: [C], added to every pixel of x (the bias of the convolution that made x).
        scale_shift: [B, 2 (C + C2)] of any batch stride: each picture's scale, then its offset.
            None: no modulation.
        keep: return t without a residual, too.

    Returns:
        y and t, [B, Y, X, C + C2] each, contiguous; t is empty ([0]) without a residual, unless
        `keep`.

    Raises:
        ValueError: the channels are not a multiple of groups, the activation is unknown, or a
            shape is not one of the above.

    Wu & He, Group Normalization (2018); Chan et al. (1979) for combining partial moments.
    """
    if act not in ACTIVATIONS:
        raise ValueError(
            f"group_norm_silu: act is {act!r}; it must be one of {', '.join(ACTIVATIONS)}"
        )
    batch, *pixels, width = x.shape
    channels = width + (0 if beside is None else beside.shape[-1])
    if channels % groups:
        raise ValueError(f"group_norm_silu: {channels} channels do not split into {groups} groups")
    if beside is not None and (
        list(beside.shape[1:-1]) != pixels or beside.shape[0] not in (batch, batch / 2)
    ):
        raise ValueError(
            f"group_norm_silu: beside is {list(beside.shape)}; expected {[batch, *pixels, 'C2']}"
            f" or half as many pictures"
        )
    for name, part, shape in (  # a GPU would read beyond the end of a smaller tensor
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("row", row, (batch, width)),
        ("shift", shift, (width,)),
        ("residual", residual, x.shape),
        ("scale_shift", scale_shift, (batch, 2 * channels)),
    ):
        if part is not None and part.shape != shape:
            raise ValueError(
                f"group_norm_silu: {name} is {list(part.shape)}; expected {list(shape)}"
            )
    given = (row, residual, beside, shift, scale_shift, keep)
    y, total = _op(x, weight, bias, groups, eps, act, *given)
    return y, total
